FROM python:3.11-slim-bookworm
ARG PACKAGE
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ${PACKAGE} > /dev/null && rm -rf /var/lib/apt/lists/*
