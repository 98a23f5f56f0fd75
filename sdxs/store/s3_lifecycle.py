"""Lifecycle rules of a bucket: those of this project, beside whatever others have set there."""

from __future__ import annotations

from collections.abc import Mapping

from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import AbortIncompleteMultipartUpload, Expiration, LifecycleConfig, Rule

_OURS = "sdxs "


def set_rules(client: Minio, bucket: str, days: Mapping[str, int]) -> None:
    """Expire what lies under each prefix after so many days, 0: never; uploads that were never completed, after one.

    Raises minio's S3Error. Nothing is written where the rules stand already.
    """
    present = client.get_bucket_lifecycle(bucket)
    before = present.rules if present else []
    mine = {f"{_OURS}{prefix}" for prefix in days}
    rules = [rule for rule in before if rule.rule_id not in mine] + [_rule(*each) for each in days.items() if each[1]]
    if {_said(rule) for rule in rules} == {_said(rule) for rule in before}:
        return
    if rules:
        client.set_bucket_lifecycle(bucket, LifecycleConfig(rules))
    else:
        client.delete_bucket_lifecycle(bucket)


def _rule(prefix: str, days: int) -> Rule:
    abandoned = AbortIncompleteMultipartUpload(days_after_initiation=1)
    return Rule(
        ENABLED,
        rule_filter=Filter(prefix=prefix),
        rule_id=f"{_OURS}{prefix}",
        expiration=Expiration(days=days),
        abort_incomplete_multipart_upload=abandoned,
    )


def _said(rule: Rule) -> tuple[str, int]:
    """What a change of ours would change."""
    days = rule.expiration.days if rule.expiration else None
    return rule.rule_id or "", days or 0
