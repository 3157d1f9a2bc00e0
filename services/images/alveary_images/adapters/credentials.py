"""Credentials of registries: encrypted in the object store, in the clear only on their way to the docker daemon."""

from __future__ import annotations

import hashlib
import json

from joserfc import jwe
from joserfc.jwk import OctKey

from alveary_core.errors import NotFound
from alveary_core.objectstore import ObjectStore
from alveary_images.settings import ImagesSettings

_BUCKET, _KEY = "images", "credentials.jwe"


class Credentials:
    """One object for all registries; AES-256-GCM under a key that follows from the platform's token secret."""

    def __init__(self, settings: ImagesSettings, store: ObjectStore) -> None:
        self._settings, self._store = settings, store
        secret = b"alveary-registry-credentials:" + settings.token_secret.get_secret_value().encode()
        self._key = OctKey.import_key(hashlib.sha256(secret).digest())

    async def all(self) -> dict[str, dict[str, str]]:
        """{registry: {"username", "password"}} of those that were set."""
        try:
            sealed = await self._store.get(_BUCKET, _KEY)
        except NotFound:
            return {}
        found: dict[str, dict[str, str]] = json.loads(jwe.decrypt_compact(sealed, self._key).plaintext or b"{}")
        return found

    async def set(self, registry: str, username: str, password: str) -> None:
        """Keep a registry's credentials, or with an empty password forget them."""
        known = await self.all()
        known.pop(registry, None)
        if password:
            known[registry] = {"username": username, "password": password}
        sealed = jwe.encrypt_compact({"alg": "dir", "enc": "A256GCM"}, json.dumps(known).encode(), self._key)
        await self._store.put(_BUCKET, _KEY, sealed.encode())

    async def auths(self) -> dict[str, dict[str, str]]:
        """All, and those of the platform's own registry."""
        found = await self.all()
        if self._settings.registry and self._settings.registry_user:
            password = self._settings.registry_password.get_secret_value()
            found[self._settings.registry] = {"username": self._settings.registry_user, "password": password}
        return found
