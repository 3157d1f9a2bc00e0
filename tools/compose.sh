#!/usr/bin/env bash
# The stack of docker-compose.yml: up, demo DATA EPOCHS, verify, gc, restore, backup, restore-objects, down. COMPOSE_FILES adds override files (separated by ':').
set -euo pipefail
cd "$(dirname "$0")/.."
if docker compose version > /dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
files=(-f docker-compose.yml)
IFS=: read -ra extra <<< "${COMPOSE_FILES:-}"
for file in "${extra[@]}"; do [ -z "$file" ] || files+=(-f "$file"); done
compose+=("${files[@]}")
export ALVEARY_CONFIG=$PWD/deploy/secrets/config.json
case ${1:-} in
up)
    if [[ "${COMPOSE_FILES:-}" == *standin* ]]; then deploy/standin/base.sh "${PYTHON_IMAGE:-python:3.11-slim-bookworm}"; fi
    "${compose[@]}" build
    "${compose[@]}" up -d "${@:2}"
    for _ in $(seq 240); do
        if .venv/bin/alveary compute list --json 2> /dev/null | grep -q '"nodes": "[1-9]'; then
            echo "ready: export ALVEARY_CONFIG=$ALVEARY_CONFIG"
            exit 0
        fi
        sleep 0.5
    done
    "${compose[@]}" ps
    echo "the stack is not ready after two minutes; see: ${compose[*]} logs" >&2
    exit 1
    ;;
demo) PATH="$PWD/.venv/bin:$PATH" tools/demo.sh "${2:-}" "${3:-2}" ;;
verify) "${compose[@]}" run --rm archiver python -m alveary_archiver verify ;;
gc)
    set -a && . ./.env && set +a
    "${compose[@]}" run --rm -e "ALVEARY_S3_ACCESS_KEY=$S3_ACCESS_COLLECTOR" -e "ALVEARY_S3_SECRET_KEY=$S3_SECRET_COLLECTOR" archiver \
        python -m alveary_archiver gc "${@:2}"
    ;;
restore)
    # The event log's volume was lost: an empty server, the second copy, then everything else.
    "${compose[@]}" stop
    "${compose[@]}" up -d nats minio
    set -a && . ./.env && set +a
    "${compose[@]}" run --rm -e ALVEARY_NATS_USER=restore -e "ALVEARY_NATS_PASSWORD=$NATS_RESTORE" archiver python -m alveary_archiver restore
    # Views of the lost log are made anew from the restored one.
    "${compose[@]}" up -d --force-recreate
    ;;
backup)
    # Of the object store, to a tar file: it stands still meanwhile, and those who need it wait and try again.
    [ -n "${2:-}" ] || { echo "usage: tools/compose.sh backup FILE.tar" >&2; exit 2; }
    container=$("${compose[@]}" ps -q minio)
    "${compose[@]}" stop minio
    docker cp "$container:/data/." - > "$2.part" || { "${compose[@]}" up -d --no-deps minio; exit 1; }
    mv "$2.part" "$2"
    "${compose[@]}" up -d --no-deps minio
    ;;
restore-objects)
    # The object store's volume was lost: a new one, filled from `backup`'s file before anybody uses it.
    [ -f "${2:-}" ] || { echo "usage: tools/compose.sh restore-objects FILE.tar" >&2; exit 2; }
    "${compose[@]}" stop
    "${compose[@]}" rm -f minio
    "${compose[@]}" up --no-start --no-deps minio
    docker cp - "$("${compose[@]}" ps -q -a minio):/data" < "$2"
    "${compose[@]}" up -d
    ;;
down) "${compose[@]}" down --remove-orphans "${@:2}" ;;
*)
    echo "usage: tools/compose.sh up | demo [DATA [EPOCHS]] | verify | gc [--dry-run] [--grace-days N] | restore | backup FILE | restore-objects FILE | down [-v]" >&2
    exit 2
    ;;
esac
