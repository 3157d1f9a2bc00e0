#!/usr/bin/env bash
# Tests that need a docker daemon: images, containers, and the end-to-end suite once more in containers.
# Uses the daemon that is there; where none answers, starts one of its own (as root) and ends it afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python

missing=()
for pair in docker:docker.io dockerd:docker.io docker-compose:docker-compose docker-registry:docker-registry debootstrap:debootstrap; do
    command -v "${pair%%:*}" > /dev/null || [ -x "/usr/sbin/${pair%%:*}" ] || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "these Debian packages are missing, and only root can install them: ${missing[*]}" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iptables "${missing[@]}" > /dev/null
fi
export PATH=$PATH:/usr/sbin

if ! timeout 20 docker info > /dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || { echo "no docker daemon answers, and only root can start one" >&2; exit 1; }
    folder=$(mktemp -d)
    dockerd --host "unix://$folder/docker.sock" --data-root "$folder/data" --exec-root "$folder/exec" --pidfile "$folder/pid" \
        --default-ulimit nofile=20000:20000 --default-ulimit nproc=32768:32768 > "$folder/log" 2>&1 &
    daemon=$!
    stop() {
        kill "$daemon" 2> /dev/null || true
        wait "$daemon" 2> /dev/null || true
        rm -rf "$folder" 2> /dev/null || true
    }
    trap stop EXIT
    export DOCKER_HOST=unix://$folder/docker.sock
    for _ in $(seq 300); do
        if timeout 5 docker info > /dev/null 2>&1; then break; fi
        kill -0 "$daemon" 2> /dev/null || { echo "dockerd ended at once:" >&2; tail -20 "$folder/log" >&2; exit 1; }
        sleep 0.2
    done
fi
deploy/standin/base.sh python:3.11-slim-bookworm
"$python" -m pytest -q -n 2 --dist loadfile tests/docker_daemon "$@"
ALVEARY_TEST_RUNTIME=docker "$python" -m pytest -q -n 2 --dist loadfile tests/e2e/test_runs.py tests/e2e/test_models.py "$@"
# What needs nothing of the trainer's own Python.
ALVEARY_TEST_RUNTIME=docker "$python" -m pytest -q tests/e2e/test_resume.py -k "preempted or policy" "$@"
