"""Who may do what on the message bus and in the object store: the one place that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping

# What each NATS user may publish: the aggregates that its service owns, and its high-rate streams.
WRITES: dict[str, tuple[str, ...]] = {
    "runs": ("alveary.*.run.>", "alveary-metrics.>"),
    "images": ("alveary.*.image.>", "alveary-logs.>"),
    "scheduler": ("alveary.*.target.>", "alveary.*.node.>", "alveary.*.placement.>", "alveary-scheduler.>"),
    "trainer": ("alveary.*.attempt.>", "alveary-logs.>", "alveary-metrics.>", "alveary-heartbeat.>", "alveary-gang.>"),
    "logs": ("alveary.*.log.>",),
    "registry": ("alveary.*.model.>", "alveary.*.dataset.>"),
    "archiver": (),
    # Used by `alveary admin restore` alone.
    "restore": ("alveary.>", "alveary-metrics.>"),
}
# What the key of each service may do with each bucket: "r" read, "w" write and delete, "rw" both.
BUCKETS: dict[str, dict[str, str]] = {
    "runs": {"snapshots": "rw", "runs": "rw", "views": "rw"},
    "images": {"images": "rw"},
    "scheduler": {},
    "trainer": {"snapshots": "r", "datasets": "r", "images": "r", "models": "rw", "runs": "rw"},
    "logs": {"runs": "rw"},
    "registry": {"datasets": "rw", "models": "rw", "runs": "r", "snapshots": "r"},
    "archiver": {"archive": "rw"},
    # Used by `alveary admin gc` alone: no service that runs all the time may remove what is another's.
    "collector": {"snapshots": "rw", "datasets": "rw", "models": "rw", "runs": "rw", "archive": "r"},
}
# Events that a service could not handle, and the answer when it is asked to try one again.
_LETTERS = ("alveary-dead.>", "alveary-redrive.>")
_COMMON = ("$JS.API.>", "$JS.ACK.>", "$JS.FC.>", "_INBOX.>", "_FC.>")
_DENY = ("$JS.API.STREAM.DELETE.>", "$JS.API.STREAM.UPDATE.>", "$JS.API.STREAM.MSG.DELETE.>")
_PURGE = "$JS.API.STREAM.PURGE.ALVEARY"
_READS = ("$JS.API.CONSUMER.>", "$JS.API.STREAM.INFO.>", "$JS.API.STREAM.NAMES", "$JS.API.INFO", "$JS.ACK.>", "$JS.FC.>", "_INBOX.>")


def nats_users(passwords: Mapping[str, str]) -> str:
    """The users block of nats-server.conf: one a service, that may write its own subjects alone, and `subscriber`,
    which may read all events and write none."""
    users = []
    for name, own in WRITES.items():
        # Compaction purges what one newer event says: of runs, placements and attempts, so runs alone may.
        deny = [*_DENY, *([] if name in ("runs", "restore") else [_PURGE])]
        allow = json.dumps([*own, *_COMMON, *(_LETTERS if name != "trainer" else ())])
        users.append(
            f'{{user: {name}, password: "{passwords[name]}", permissions: {{publish: {{allow: {allow}, deny: {json.dumps(deny)}}}}}}}'
        )
    users.append(
        f'{{user: subscriber, password: "{passwords["subscriber"]}", permissions: {{publish: {{allow: {json.dumps(_READS)}}}, '
        'subscribe: {allow: ["alveary.>", "_INBOX.>"]}}}'
    )
    return "authorization { users: [\n  " + "\n  ".join(users) + "\n] }\n"


def s3_policy(service: str) -> dict[str, object]:
    """An S3 policy document of a service's key."""
    actions = {"r": ["s3:GetObject"], "w": ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]}
    statements: list[dict[str, object]] = []
    for bucket, rights in BUCKETS[service].items():
        allowed = [action for right in rights for action in actions[right]]
        statements.append({"Effect": "Allow", "Action": allowed, "Resource": [f"arn:aws:s3:::{bucket}/*"]})
        listing = ["s3:ListBucket", "s3:GetBucketLocation", *(["s3:ListBucketMultipartUploads"] if "w" in rights else [])]
        statements.append({"Effect": "Allow", "Action": listing, "Resource": [f"arn:aws:s3:::{bucket}"]})
    return {"Version": "2012-10-17", "Statement": statements}


def weed_identities(keys: Mapping[str, tuple[str, str]], root: tuple[str, str]) -> str:
    """SeaweedFS's s3.json: the same rights, as it spells them."""
    identities: list[dict[str, object]] = [
        {
            "name": "root",
            "credentials": [{"accessKey": root[0], "secretKey": root[1]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
    for service, (access, secret) in keys.items():
        actions = []
        for bucket, rights in BUCKETS[service].items():
            actions += [f"List:{bucket}", *([f"Read:{bucket}"] if "r" in rights else []), *([f"Write:{bucket}"] if "w" in rights else [])]
        # A key without any right could not be told from one that is unknown.
        identities.append(
            {"name": service, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions or ["List:none"]}
        )
    return json.dumps({"identities": identities}, indent=1)
