#!/bin/sh
# restore_command = '/usr/local/bin/wal-restore.sh %f %p'
#
# Runs the pitr-hook that lies beside this file. Exit 0: the WAL file is at %p. Exit 1: no such file exists. Any other
# failure must be above 125, or PostgreSQL takes it for the end of the WAL and opens a database that lacks the rest.
self=$0
[ ! -L "$self" ] || self=$(readlink -f "$self")
case $self in
*/*) hook=${self%/*}/pitr-hook ;;
*) hook=./pitr-hook ;;
esac
if [ -x "$hook" ]; then
    exec "$hook" restore "$@"
fi
echo "wal-restore.sh: there is no program \"$hook\". Install pitr-hook beside wal-restore.sh." >&2
exit 255
