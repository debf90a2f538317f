# PostgreSQL, agent and hook in one image; target "agent" is the agent and the hook alone.
#
#   docker build -t postgres-pitr --build-arg PG_MAJOR=17 .
#   docker build -t pitr-agent --target agent .

ARG PG_MAJOR=18
ARG DEBIAN=bookworm

# The hook is compiled (static) and the agent installed with the Python that the images below have, too.
FROM debian:${DEBIAN}-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pitr
COPY pyproject.toml README.md /src/
COPY hooks /src/hooks
COPY agent /src/agent
RUN /opt/pitr/bin/pip install --no-cache-dir /src && /opt/pitr/bin/pitr-hook --version

FROM debian:${DEBIAN}-slim AS agent
# 999 is the user postgres of the official image, to whom the data directory belongs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 999 postgres \
    && useradd --uid 999 --gid 999 --no-create-home postgres \
    && install -d -o postgres -g postgres -m 0770 /run/pitr
COPY --from=build /opt/pitr /opt/pitr
ENV PATH=/opt/pitr/bin:$PATH
USER postgres
EXPOSE 9108
ENTRYPOINT ["pitr"]
CMD ["agent"]

FROM postgres:${PG_MAJOR}-${DEBIAN} AS postgres-pitr
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o postgres -g postgres -m 0770 /run/pitr
COPY --from=build /opt/pitr /opt/pitr
COPY images/postgres-pitr/postgresql-pitr.conf /etc/postgresql/
# Every data directory made by this image's initdb archives. An older one: add the same line to its postgresql.conf.
RUN ln -s /opt/pitr/bin/pitr /opt/pitr/bin/pitr-hook /opt/pitr/bin/wal-archive.sh /opt/pitr/bin/wal-restore.sh \
        /usr/local/bin/ \
    && echo "include_if_exists = '/etc/postgresql/postgresql-pitr.conf'" >> /usr/share/postgresql/postgresql.conf.sample
USER postgres
EXPOSE 9108
