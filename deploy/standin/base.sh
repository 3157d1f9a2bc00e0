#!/usr/bin/env bash
# A stand-in for the Python base image, where no image registry can be reached: a minimal Debian with its python3,
# made by debootstrap and imported under the very tag that the Dockerfiles name. Does nothing where the tag exists.
# It gets this machine's package mirrors, CA certificates and pip settings, as whoever has no registry needs them too.
set -euo pipefail
tag=${1:-python:3.11-slim-bookworm}
if docker image inspect "$tag" > /dev/null 2>&1; then exit 0; fi
if [ "${2:-}" != --always ] && timeout 60 docker pull --quiet "$tag" > /dev/null 2>&1; then exit 0; fi
command -v debootstrap > /dev/null || { echo "debootstrap is missing: apt-get install debootstrap" >&2; exit 1; }
mirror=$(grep -rhoE 'https?://[^ ]+/debian/?$' /etc/apt/sources.list /etc/apt/sources.list.d/ 2> /dev/null | head -1 || true)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
echo "making a stand-in for $tag with debootstrap" >&2
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" \
    ${mirror:+"$mirror"} > "$root.log" 2>&1 || { tail -20 "$root.log" >&2; exit 1; }
rm -f "$root.log"
for file in /etc/apt/apt.conf.d/99* /etc/pip.conf /etc/xdg/pip/*; do
    if [ -f "$file" ]; then install -D -m 644 "$file" "$root$file"; fi
done
cp -r /etc/apt/sources.list.d/. "$root/etc/apt/sources.list.d/" 2> /dev/null || true
if ls "$root"/etc/apt/sources.list.d/* > /dev/null 2>&1; then rm -f "$root/etc/apt/sources.list"; fi
cp -rL /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
if [ ! -f "$root/etc/pip.conf" ]; then printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$root/etc/pip.conf"; fi
ln -sf python3 "$root/usr/bin/python"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
tar -C "$root" -c . | docker import --change 'CMD ["python3"]' - "$tag" > /dev/null
