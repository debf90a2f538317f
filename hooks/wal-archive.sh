#!/bin/sh
# archive_command = '/usr/local/bin/wal-archive.sh %p %f'
#
# Runs the pitr-hook that lies beside this file. Exit 0: the WAL file is durable in the repository. Exit 1: it is not,
# PostgreSQL keeps it and asks again. A shell's own 126 and 127 would restart the archiver without being counted.
self=$0
[ ! -L "$self" ] || self=$(readlink -f "$self")
case $self in
*/*) hook=${self%/*}/pitr-hook ;;
*) hook=./pitr-hook ;;
esac
if [ -x "$hook" ]; then
    exec "$hook" archive "$@"
fi
echo "wal-archive.sh: there is no program \"$hook\". Install pitr-hook beside wal-archive.sh." >&2
exit 1
