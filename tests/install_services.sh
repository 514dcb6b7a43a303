#!/bin/sh
# Redis, PostgreSQL, libfaketime, Prometheus and wget for the tests, from Debian's packages, where
# they are missing.
# Nothing is started here: the tests start their own servers, on their own ports, in their own
# directories.
set -eu

missing=""
command -v redis-server >/dev/null 2>&1 || missing="$missing redis-server"
command -v initdb >/dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 ||
    missing="$missing postgresql"
ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || missing="$missing libfaketime"
command -v promtool >/dev/null 2>&1 || missing="$missing prometheus"
command -v wget >/dev/null 2>&1 || missing="$missing wget"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing and not to be had here:$missing; tests that need them are skipped" >&2
    exit 0
fi
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo"
export DEBIAN_FRONTEND=noninteractive
# Installing a server package starts it, unless this says no.
policy=/usr/sbin/policy-rc.d
made=""
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
    made=yes
fi
status=0
{ $as_root apt-get update -qq && $as_root apt-get install -y -qq --no-install-recommends $missing; } \
    >/dev/null || status=$?
[ -z "$made" ] || $as_root rm -f "$policy"
exit "$status"
