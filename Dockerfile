# PostgreSQL, the agent and the hook in one image; target "pitr-agent" is the agent and the hook alone, for a sidecar
# beside a PostgreSQL image that stays as it is. Builds for amd64 and arm64; nothing in it names an architecture.
#
#   docker build -t postgres-pitr --build-arg PG_MAJOR=17 .
#   docker build -t pitr-agent --target pitr-agent .
#
# POSTGRES_IMAGE has to be a Debian one; beside a server of Alpine's image runs pitr-agent, for the hook is static.

ARG PG_MAJOR=18
ARG DEBIAN=bookworm
ARG POSTGRES_IMAGE=postgres:${PG_MAJOR}-${DEBIAN}

# The hook: static, so that it runs in whatever image PostgreSQL runs in.
FROM debian:${DEBIAN}-slim AS build
# Security fixes are wanted as they come: the release of Debian is pinned, not its packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pitr
COPY pyproject.toml README.md /src/
COPY hooks /src/hooks
COPY agent /src/agent
# What only an installation needs is removed: pip, tests, and the descriptions of the 400 cloud services that are not S3.
RUN /opt/pitr/bin/pip install --no-cache-dir /src \
    && /opt/pitr/bin/pitr-hook --version \
    && find /opt/pitr/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -rf {} + \
    && find /opt/pitr/lib -type d -name tests -prune -exec rm -rf {} + \
    && /opt/pitr/bin/pip uninstall -y setuptools \
    && /opt/pitr/bin/pip uninstall -y pip \
    && find /opt/pitr/bin -type f ! -name 'pitr*' ! -name 'wal-*.sh' -delete \
    && python3 -m compileall -q /opt/pitr/lib

FROM debian:${DEBIAN}-slim AS pitr-agent
# 999 is the user postgres of the official images, to whom the data directory belongs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log \
    && groupadd --gid 999 postgres \
    && useradd --uid 999 --gid 999 --no-create-home postgres \
    && install -d -o postgres -g postgres -m 0770 /run/pitr
COPY --from=build /opt/pitr /opt/pitr
ENV PATH=/opt/pitr/bin:$PATH
USER 999:999
EXPOSE 9108
ENTRYPOINT ["pitr"]
CMD ["agent"]

# Its tag is an argument with a default above.
# hadolint ignore=DL3006
FROM ${POSTGRES_IMAGE} AS postgres-pitr
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log \
    && install -d -o postgres -g postgres -m 0770 /run/pitr
COPY --from=build /opt/pitr /opt/pitr
COPY images/postgres-pitr/postgresql-pitr.conf /etc/postgresql/
# Every data directory made by this image's initdb archives. An older one: add the same line to its postgresql.conf.
RUN ln -s /opt/pitr/bin/pitr /opt/pitr/bin/pitr-hook /opt/pitr/bin/wal-archive.sh /opt/pitr/bin/wal-restore.sh \
        /usr/local/bin/ \
    && for sample in /usr/share/postgresql/*/postgresql.conf.sample; do \
        echo "include_if_exists = '/etc/postgresql/postgresql-pitr.conf'" >> "$sample"; done
USER 999:999
EXPOSE 9108
