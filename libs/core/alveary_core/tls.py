"""Whom we believe to be who they say they are."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import certifi


def context(ca: Path | None) -> ssl.SSLContext:
    """For connections to others: public authorities ($SSL_CERT_FILE, or certifi's), and those in the PEM file `ca`.

    Raises:
        OSError: the file cannot be read, or holds no certificate.
    """
    made = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
    if ca:
        made.load_verify_locations(ca)
    return made
