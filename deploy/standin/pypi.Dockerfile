FROM python:3.11-slim-bookworm
ARG PACKAGE
ARG PROGRAM
COPY requirements.txt /tmp/
RUN python3 -m venv /opt/server && /opt/server/bin/pip install --quiet --no-cache-dir --constraint /tmp/requirements.txt ${PACKAGE} \
    && ln -s "/opt/server/bin/${PROGRAM}" /usr/local/bin/server
ENTRYPOINT ["server"]
