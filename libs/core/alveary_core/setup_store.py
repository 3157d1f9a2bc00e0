"""Sets an object store up: buckets, and on MinIO a user and policy per service. `python -m alveary_core.setup_store`.

Reads S3_ROOT_ACCESS, S3_ROOT_SECRET, ALVEARY_S3_ENDPOINT, and S3_ACCESS_<SERVICE>, S3_SECRET_<SERVICE>; STORE_USERS=static
says that the server has its users from its own configuration. Idempotent.
"""

from __future__ import annotations

import asyncio
import os

from minio import MinioAdmin
from minio.credentials.providers import StaticProvider

from alveary_core.access import BUCKETS, s3_policy
from alveary_core.objectstore import ObjectStore


def users(endpoint: str, access: str, secret: str) -> None:
    """A user and policy per service."""
    admin = MinioAdmin(endpoint=endpoint, credentials=StaticProvider(access, secret), secure=False)
    for service in BUCKETS:
        name = os.environ[f"S3_ACCESS_{service.upper()}"]
        policy = s3_policy(service)
        admin.user_add(name, os.environ[f"S3_SECRET_{service.upper()}"])
        if policy["Statement"]:
            admin.policy_add(f"alveary-{service}", policy=policy)
            admin.policy_set(f"alveary-{service}", user=name)


async def main() -> None:
    """All of it; waits up to a minute for the server."""
    endpoint, access, secret = (os.environ[n] for n in ("ALVEARY_S3_ENDPOINT", "S3_ROOT_ACCESS", "S3_ROOT_SECRET"))
    store = ObjectStore(endpoint, access, secret)
    await store.ensure_buckets()
    store.close()
    if os.environ.get("STORE_USERS") != "static":
        await asyncio.to_thread(users, endpoint, access, secret)
    print("the object store is set up")


if __name__ == "__main__":
    asyncio.run(main())
