"""When reinforcement learning is stopped before its steps are done: the policy collapsed, or games its reward. Pure."""

from collections.abc import Mapping, Sequence

from pipeline.recipe import StopRulesConfig


def reason_to_stop(
    curve: Sequence[Mapping[str, float]], *, rules: StopRulesConfig, is_distillation: bool
) -> str | None:
    """Return why the training whose steps are `curve` must end now; None while it may go on.

    A rule has to hold for `patience_steps` steps in a row: single steps are noise. Collapse is low entropy, a policy
    far from its start, or groups without any difference. Gaming is a held-out reward that fell while the training
    reward is no lower than at the start; rows between two measurements repeat the older one, so that the last two
    measurements have to agree besides. Distillation is held to its entropy alone: it starts far from its teacher, and
    does not learn from rewards.
    """
    recent = curve[-rules.patience_steps :]
    if len(recent) < rules.patience_steps:
        return None
    first = curve[0]
    if all(row["entropy"] < rules.min_entropy_nats for row in recent):
        return f"collapse: entropy below {rules.min_entropy_nats:g} nats for {len(recent)} steps"
    if is_distillation:
        return None
    if all(row["kl"] > rules.max_kl_nats for row in recent):
        return f"collapse: KL to the start above {rules.max_kl_nats:g} nats per token for {len(recent)} steps"
    if all(row["share_zero_advantage_groups"] >= 1 for row in recent):
        return f"collapse: all samples of every group earned the same for {len(recent)} steps"
    measured = [row for row in curve if row["is_held_out_measured"]]
    has_dropped = all(
        row["held_out_reward"] < first["held_out_reward"] - rules.max_held_out_drop for row in (*recent, *measured[-2:])
    )
    if has_dropped and all(row["reward"] >= first["reward"] for row in recent):
        return (
            f"reward hacking: for {len(recent)} steps the held-out reward lies more than {rules.max_held_out_drop:g} "
            f"below its start ({recent[-1]['held_out_reward']:.3g} of {first['held_out_reward']:.3g}), the training "
            "reward does not"
        )
    return None
