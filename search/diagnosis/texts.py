"""The words of the diagnosis, in English and in Chinese side by side; `search.diagnosis.messages` fills them in.

`{name:spec}` is a named value of the evidence; `messages` explains the specs `loss`, `rate`, `pct`, `time`, `times` and `end`.
A clause of `EXTRAS` is added if all values that it names are known.
"""

# ruff: noqa: E501
# A sentence in one piece is easier to check against its translation than one broken to the line length.

from __future__ import annotations

from typing import Final

from search import records

# Each entry: (English, Chinese).
TITLES: Final = {
    "non_finite": ("NaN or infinity", "出现 NaN/Inf"),
    "exploding_gradient": ("exploding gradient", "梯度爆炸"),
    "diverged": ("diverged", "训练发散"),
    "oscillating": ("oscillating", "loss 震荡"),
    "overfitting": ("overfitting", "过拟合"),
    "not_learning": ("not learning", "没有学到东西"),
    "too_slow": ("too slow", "收敛过慢"),
    "still_falling": ("still falling", "仍在下降"),
    "inconclusive": ("too early to tell", "尚无法判断"),
    "healthy": ("healthy", "训练正常"),
    "warmup_exceeds_training": ("warmup longer than the training", "warmup 超过总训练步数"),
    "slow_epoch": ("slow epochs", "每个 epoch 过慢"),
}

ENDS: Final = {
    records.FINISHED: ("all epochs done", "全部 epoch 完成"),
    records.RISING: ("validation loss rising", "验证 loss 持续上升"),
    records.DIVERGED: ("diverged", "训练发散"),
    records.NON_FINITE: ("NaN or infinity", "出现 NaN/Inf"),
    records.OUT_OF_MEMORY: ("out of memory", "显存不足"),
    records.SUPERSEDED: ("behind other trials", "落后于其他实验"),
    records.PROBE: ("stability probe, done", "稳定性试探，已完成"),
    records.REPEAT: ("repeat, done", "重复实验，已完成"),
    records.INTERRUPTED: ("interrupted, to be resumed", "已中断，稍后继续"),
    records.SETTLED: ("more epochs were not expected to lower it", "预计继续训练不会再降低"),
    records.PAUSED: ("paused, goes on if it is worth more than the others", "已暂停，若比其他试验更有希望则继续"),
    records.LOST: ("process lost", "进程丢失"),
    records.ERROR: ("internal error", "程序错误"),
}
"""Why a run ended, by `search.records`' reasons."""

SENTENCES: Final = {
    "non_finite.update": (
        "{tensor} was {value} at step {step}, caused by the update before it",
        "第 {step} 步时 {tensor} 已是 {value}，由前一次参数更新造成",
    ),
    "non_finite.pass": ("{tensor} was {value} at step {step}", "第 {step} 步 {tensor} 出现 {value}"),
    "non_finite.epoch_train": (
        "the training loss was {value} at epoch {epoch}",
        "第 {epoch} 个 epoch 的训练 loss 为 {value}",
    ),
    "non_finite.epoch_val": (
        "the validation loss was {value} at epoch {epoch}",
        "第 {epoch} 个 epoch 的验证 loss 为 {value}",
    ),
    "non_finite.unknown": (
        "the run ended because numbers were not finite; which tensor went bad first is not recorded",
        "训练因数值非有限而终止；最先出问题的张量没有记录",
    ),
    "exploding_gradient.steps": (
        "the gradient norm grew {growth:times}-fold, from {grad_norm_before:loss} to {grad_norm_after:loss} "
        "(medians), from step {step} on",
        "从第 {step} 步起梯度范数增大到 {growth:times} 倍：{grad_norm_before:loss} → {grad_norm_after:loss}（中位数）",
    ),
    "exploding_gradient.epochs": (
        "the mean gradient norm grew {growth:times}-fold, from {grad_norm_before:loss} to {grad_norm_after:loss}, "
        "from epoch {epoch} on",
        "从第 {epoch} 个 epoch 起平均梯度范数增大到 {growth:times} 倍：{grad_norm_before:loss} → {grad_norm_after:loss}",
    ),
    "diverged.jump": (
        "the training loss jumped from {train_before:loss} to {train_last:loss} at epoch {epoch} and gave back "
        "{given_back:pct} of what it had gained",
        "第 {epoch} 个 epoch 训练 loss 突然上升：{train_before:loss} → {train_last:loss}，此前降幅丢失 {given_back:pct}",
    ),
    "diverged.jump_from_first": (
        "the training loss rose above its first value, from {train_before:loss} (epoch {best_epoch}) to {train_last:loss} "
        "at epoch {epoch}",
        "训练 loss 从最初的 {train_before:loss}（epoch {best_epoch}）升至 {train_last:loss}（epoch {epoch}），一直没有下降",
    ),
    "diverged.rise": (
        "the training loss rose from {train_before:loss} (epoch {best_epoch}) to {train_last:loss} (epoch "
        "{last_epoch}) and did not come back",
        "训练 loss 从 {train_before:loss}（epoch {best_epoch}）升至 {train_last:loss}（epoch {last_epoch}），未再回落",
    ),
    "diverged.plateau": (
        "the training loss jumped from {train_before:loss} to {train_at:loss} at epoch {epoch} and stayed there, "
        "{train_last:loss} at epoch {last_epoch}",
        "第 {epoch} 个 epoch 训练 loss 从 {train_before:loss} 跳到 {train_at:loss}，此后停在高位"
        "（epoch {last_epoch}：{train_last:loss}）",
    ),
    "diverged.stopped": (
        "the run was stopped as diverged: training loss {train_before:loss} to {train_last:loss} at epoch {epoch}",
        "第 {epoch} 个 epoch 训练 loss {train_before:loss} → {train_last:loss}，按发散停止",
    ),
    "oscillating.rising": (
        "the training loss turned up at epoch {epoch}: {train_before:loss} (epoch {best_epoch}) to {train_last:loss} "
        "(epoch {last_epoch}), {rise:pct}, more than its noise explains",
        "训练 loss 从第 {epoch} 个 epoch 起回升：{train_before:loss}（epoch {best_epoch}）→ {train_last:loss}"
        "（epoch {last_epoch}），升幅 {rise:pct}，超出噪声范围",
    ),
    "oscillating.swinging_train": (
        "the training loss went up and came back {times} times, at most from {before:loss} to {peak:loss} "
        "(epoch {peak_epoch})",
        "训练 loss 反复上升又回落 {times} 次，最大一次 {before:loss} → {peak:loss}（epoch {peak_epoch}）",
    ),
    "oscillating.swinging_val": (
        "the validation loss went up and came back {times} times, at most from {before:loss} to {peak:loss} "
        "(epoch {peak_epoch})",
        "验证 loss 反复上升又回落 {times} 次，最大一次 {before:loss} → {peak:loss}（epoch {peak_epoch}）",
    ),
    "overfitting.falling": (
        "the validation loss rose from epoch {epoch} on, {val_best:loss} (epoch {best_epoch}) to {val_last:loss} (epoch "
        "{last_epoch}), {rise:pct}, while the training loss fell from {train_at_best:loss} to {train_last:loss}",
        "验证 loss 从第 {epoch} 个 epoch 开始上升：{val_best:loss}（epoch {best_epoch}）→ {val_last:loss}（epoch {last_epoch}），"
        "升幅 {rise:pct}；同期训练 loss 仍在下降：{train_at_best:loss} → {train_last:loss}",
    ),
    "overfitting.flat": (
        "the validation loss rose from epoch {epoch} on, {val_best:loss} (epoch {best_epoch}) to {val_last:loss} (epoch "
        "{last_epoch}), {rise:pct}, while the training loss stayed at {train_last:loss}",
        "验证 loss 从第 {epoch} 个 epoch 开始上升：{val_best:loss}（epoch {best_epoch}）→ {val_last:loss}（epoch {last_epoch}），"
        "升幅 {rise:pct}；同期训练 loss 停在 {train_last:loss}",
    ),
    "overfitting.val_only": (
        "the validation loss rose from epoch {epoch} on, {val_best:loss} (epoch {best_epoch}) to {val_last:loss} (epoch "
        "{last_epoch}), {rise:pct}; no training loss was recorded beside it",
        "验证 loss 从第 {epoch} 个 epoch 开始上升：{val_best:loss}（epoch {best_epoch}）→ {val_last:loss}（epoch {last_epoch}），"
        "升幅 {rise:pct}；同期没有训练 loss 记录",
    ),
    "not_learning.low_rate": (
        "no loss fell by more than noise from epoch {first_epoch} to {last_epoch} ({fall:pct})",
        "epoch {first_epoch} 到 {last_epoch}，loss 没有超出噪声的下降（{fall:pct}）",
    ),
    "not_learning.high_rate": (
        "no loss fell by more than noise from epoch {first_epoch} to {last_epoch} ({fall:pct}), at a high learning rate",
        "学习率偏高，epoch {first_epoch} 到 {last_epoch} loss 没有超出噪声的下降（{fall:pct}）",
    ),
    "not_learning.flat": (
        "no loss fell by more than noise from epoch {first_epoch} to {last_epoch} ({fall:pct})",
        "epoch {first_epoch} 到 {last_epoch}，loss 没有超出噪声的下降（{fall:pct}）",
    ),
    "too_slow.val": (
        "stable, but the validation loss still falls at the last epoch, {last_epoch}: {val_first:loss} to {val_last:loss}, "
        "now {per_epoch:pct} an epoch",
        "训练稳定，但到最后的 epoch {last_epoch} 验证 loss 仍在下降：{val_first:loss} → {val_last:loss}，目前每个 epoch 约 {per_epoch:pct}",
    ),
    "too_slow.train": (
        "stable, but the training loss still falls at the last epoch, {last_epoch}: {train_first:loss} to {train_last:loss}, "
        "now {per_epoch:pct} an epoch",
        "训练稳定，但到最后的 epoch {last_epoch} 训练 loss 仍在下降：{train_first:loss} → {train_last:loss}，目前每个 epoch 约 {per_epoch:pct}",
    ),
    "inconclusive.none": ("no epoch has a loss: nothing to judge", "没有任何 epoch 的 loss 记录，无法判断"),
    "inconclusive.few": (
        "epochs trained: {epochs}, too few to tell (at least {needed} are needed): training {train_first:loss} to "
        "{train_last:loss}, validation {val_first:loss} to {val_last:loss}",
        "只有 {epochs} 个 epoch，不足以判断（至少需要 {needed} 个）：训练 {train_first:loss} → {train_last:loss}，"
        "验证 {val_first:loss} → {val_last:loss}",
    ),
    "inconclusive.few_partial": (
        "epochs trained: {epochs}, too few to tell (at least {needed} are needed)",
        "只有 {epochs} 个 epoch，不足以判断（至少需要 {needed} 个）",
    ),
    "healthy.falls_val": (
        "the validation loss fell from {val_first:loss} to {val_last:loss}, its best, at epoch {last_epoch}",
        "验证 loss 平稳下降：{val_first:loss} → {val_last:loss}，最后的 epoch {last_epoch} 即为最佳",
    ),
    "healthy.levelled_val": (
        "the validation loss fell from {val_first:loss} to its best {val_best:loss} at epoch {val_best_epoch}; since then it "
        "has stayed within noise of it, {val_last:loss} at epoch {last_epoch}",
        "验证 loss 从 {val_first:loss} 降到最佳 {val_best:loss}（epoch {val_best_epoch}），此后在噪声范围内波动，"
        "epoch {last_epoch} 为 {val_last:loss}",
    ),
    "healthy.never_fell_val": (
        "the validation loss never fell below its first value, {val_best:loss} at epoch {val_best_epoch}; since then it has "
        "stayed within noise of it, {val_last:loss} at epoch {last_epoch}",
        "验证 loss 始终没有低于最初的 {val_best:loss}（epoch {val_best_epoch}），此后在噪声范围内波动，"
        "epoch {last_epoch} 为 {val_last:loss}",
    ),
    "healthy.once_val": (
        "only one validation loss was recorded, {val_last:loss} at epoch {val_best_epoch}",
        "验证 loss 只有一次记录：{val_last:loss}（epoch {val_best_epoch}）",
    ),
    "healthy.falls_train": (
        "the training loss fell from {train_first:loss} to {train_last:loss} at epoch {last_epoch}; no validation loss was "
        "recorded",
        "训练 loss 平稳下降：{train_first:loss} → {train_last:loss}（epoch {last_epoch}）；没有验证 loss 记录",
    ),
    "healthy.levelled_train": (
        "the training loss fell from {train_first:loss} to {train_best:loss} at epoch {train_best_epoch} and has stayed within "
        "noise of it; no validation loss was recorded",
        "训练 loss 从 {train_first:loss} 降到 {train_best:loss}（epoch {train_best_epoch}），此后在噪声范围内波动；没有验证 loss 记录",
    ),
    "healthy.never_fell_train": (
        "the training loss never fell below its first value, {train_best:loss} at epoch {train_best_epoch}, and has stayed "
        "within noise of it; no validation loss was recorded",
        "训练 loss 始终没有低于最初的 {train_best:loss}（epoch {train_best_epoch}），此后在噪声范围内波动；没有验证 loss 记录",
    ),
    "warmup_exceeds_training.run": (
        "warmup of {warmup_steps} steps, but the whole training is {total_steps}",
        "warmup 为 {warmup_steps} 步，而整个训练只有 {total_steps} 步",
    ),
    "warmup_exceeds_training.steps": (
        "warmup of {warmup_steps} steps, but the whole training is {total_steps}",
        "warmup 为 {warmup_steps} 步，而整个训练只有 {total_steps} 步",
    ),
    "warmup_exceeds_training.configuration": (
        "warmup of {warmup_steps} steps, but by the configuration the whole training is {total_steps}",
        "warmup 为 {warmup_steps} 步，而按配置整个训练只有 {total_steps} 步",
    ),
    "slow_epoch.clock": (
        "an epoch takes {epoch_seconds:time}, more than {limit_seconds:time}",
        "每个 epoch 需 {epoch_seconds:time}，超过 {limit_seconds:time}",
    ),
    "slow_epoch.peers": (
        "an epoch of {samples} samples takes {epoch_seconds:time}, {ratio:times} times the {expected_seconds:time} that "
        "comparable runs would need",
        "{samples} 个样本的 epoch 用时 {epoch_seconds:time}，同类运行只需 {expected_seconds:time}，为其 {ratio:times} 倍",
    ),
    "slow_epoch.waiting": (
        "an epoch takes {epoch_seconds:time}, much of it waiting for data",
        "每个 epoch 需 {epoch_seconds:time}，其中很大一部分在等待数据",
    ),
    "slow_epoch.evaluating": (
        "an epoch takes {epoch_seconds:time}, most of it evaluation",
        "每个 epoch 需 {epoch_seconds:time}，其中大部分用于验证",
    ),
}

EXTRAS: Final[dict[str, tuple[tuple[tuple[str, ...], str, str], ...]]] = {
    "non_finite": (
        (
            ("last_finite_step", "last_finite_loss"),
            "; step {last_finite_step} was still good, loss {last_finite_loss:loss}",
            "；第 {last_finite_step} 步还正常，loss {last_finite_loss:loss}",
        ),
        (("bad_steps",), "; steps not finite in all: {bad_steps}", "；共有 {bad_steps} 步数值非有限"),
        (("torch_dtype",), "; {torch_dtype}", "；{torch_dtype}"),
        (("measured",), "; measured: {measured}", "；实测：{measured}"),
    ),
    "exploding_gradient": (
        (
            ("clipped_fraction", "max_grad_norm"),
            "; {clipped_fraction:pct} of the steps were clipped at {max_grad_norm:loss}",
            "；{clipped_fraction:pct} 的步被裁剪到 {max_grad_norm:loss}",
        ),
    ),
    "diverged": (
        (
            ("val_onset_epoch", "val_best", "val_best_epoch"),
            "; the validation loss left its best, {val_best:loss} (epoch {val_best_epoch}), at epoch {val_onset_epoch}",
            "；验证 loss 在 epoch {val_best_epoch} 达到最佳 {val_best:loss}，从 epoch {val_onset_epoch} 起上升",
        ),
        (
            ("val_before", "val_last"),
            "; validation {val_before:loss} to {val_last:loss}",
            "；验证 {val_before:loss} → {val_last:loss}",
        ),
        (("learning_rate",), "; learning rate {learning_rate:rate}", "；学习率 {learning_rate:rate}"),
    ),
    "oscillating": (
        (
            ("val_onset_epoch", "val_best", "val_best_epoch"),
            "; the validation loss left its best, {val_best:loss} (epoch {val_best_epoch}), at epoch {val_onset_epoch}",
            "；验证 loss 在 epoch {val_best_epoch} 达到最佳 {val_best:loss}，从 epoch {val_onset_epoch} 起上升",
        ),
        (
            ("val_before", "val_last"),
            "; validation {val_before:loss} to {val_last:loss}",
            "；验证 {val_before:loss} → {val_last:loss}",
        ),
        (("learning_rate",), "; learning rate {learning_rate:rate}", "；学习率 {learning_rate:rate}"),
    ),
    "overfitting": ((("learning_rate",), "; learning rate {learning_rate:rate}", "；学习率 {learning_rate:rate}"),),
    "not_learning": (
        (
            ("witnesses", "rate_times", "lower_by"),
            "; trials with an effective rate at least {rate_times:times} times as high ({witnesses}) were at least "
            "{lower_by:pct} lower at the same epoch",
            "；等效学习率至少为其 {rate_times:times} 倍的实验（{witnesses}）在同一 epoch 至少低 {lower_by:pct}",
        ),
        (
            ("train_first", "train_last"),
            "; training {train_first:loss} to {train_last:loss}",
            "；训练 {train_first:loss} → {train_last:loss}",
        ),
        (
            ("val_first", "val_last"),
            "; validation {val_first:loss} to {val_last:loss}",
            "；验证 {val_first:loss} → {val_last:loss}",
        ),
        (("learning_rate",), "; learning rate {learning_rate:rate}", "；学习率 {learning_rate:rate}"),
    ),
    "too_slow": (
        (
            ("witnesses", "rate_times", "lower_by"),
            "; trials with an effective rate at least {rate_times:times} times as high ({witnesses}) were at least "
            "{lower_by:pct} lower at the same epoch",
            "；等效学习率至少为其 {rate_times:times} 倍的实验（{witnesses}）在同一 epoch 至少低 {lower_by:pct}",
        ),
        (("learning_rate",), "; learning rate {learning_rate:rate}", "；学习率 {learning_rate:rate}"),
        (
            ("warmup_steps", "total_steps"),
            "; {warmup_steps} of its {total_steps} steps were warmup",
            "；{total_steps} 步中有 {warmup_steps} 步是 warmup",
        ),
    ),
    "inconclusive": ((("reason",), "; it ended: {reason:end}", "；结束原因：{reason:end}"),),
    "healthy": (
        (
            ("val_first", "train_first", "train_last"),
            "; training {train_first:loss} to {train_last:loss}",
            "；训练 {train_first:loss} → {train_last:loss}",
        ),
        (
            ("jump_epoch", "jump_from", "jump_to", "back_epoch"),
            "; a jump from {jump_from:loss} to {jump_to:loss} at epoch {jump_epoch} was undone by epoch {back_epoch}",
            "；epoch {jump_epoch} 曾从 {jump_from:loss} 跳到 {jump_to:loss}，到 epoch {back_epoch} 已恢复",
        ),
        (
            ("clipped_fraction",),
            "; {clipped_fraction:pct} of the steps were clipped",
            "；{clipped_fraction:pct} 的步被裁剪",
        ),
        (
            ("planned_epochs",),
            "; ended before its {planned_epochs} epochs were done",
            "；原计划 {planned_epochs} 个 epoch，提前结束",
        ),
    ),
    "warmup_exceeds_training": (
        (
            ("learning_rate", "highest_rate"),
            ": the configured rate {learning_rate:rate} is never reached, the highest is {highest_rate:rate}",
            "：达不到设定的学习率 {learning_rate:rate}，最高只到 {highest_rate:rate}",
        ),
    ),
    "slow_epoch": (
        (
            ("wait_share", "compute_share"),
            "; {wait_share:pct} waiting for data, {compute_share:pct} computing",
            "；等待数据占 {wait_share:pct}，计算占 {compute_share:pct}",
        ),
        (("eval_share",), "; {eval_share:pct} evaluating", "；验证占 {eval_share:pct}"),
    ),
}

CAUSES: Final = {
    "zero_over_zero": (
        "AdamW's eps rounds to 0 in float16, and lora_A's gradient is exactly 0 at the first step because lora_B starts "
        "at 0: the update is 0/0, which is NaN",
        "AdamW 的 eps 在 float16 中舍入为 0，而 lora_B 初始为 0，使 lora_A 第一步的梯度恰好为 0：更新量是 0/0，即 NaN",
    ),
    "square_underflow": (
        "in float16 the gradient's square underflows to 0 and so does AdamW's eps: the update divides by 0",
        "float16 下梯度的平方下溢为 0，AdamW 的 eps 也舍入为 0：更新时除以 0",
    ),
    "float16_range": (
        "float16 holds nothing above 65504 and little below 6e-8; the records are not detailed enough to say more",
        "float16 的表示范围有限（上限 65504，下限约 6e-8）；现有记录不足以进一步定位",
    ),
    "exploding_gradient": ("the gradient norm exploded", "梯度范数爆炸"),
    "high_rate": ("the learning rate is high for LoRA", "学习率对 LoRA 来说偏高"),
    "low_rate": (
        "the effective rate (learning rate x alpha, by batch and rank) is too low: that of trials that came lower at the "
        "same epoch is several times higher",
        "等效学习率（学习率 × alpha，计入 batch 与 rank）过低：同一 epoch 上 loss 更低的实验，其等效学习率高出数倍",
    ),
    "straight": (
        "the loss still falls in a straight line: at steps of this size the training has hardly begun",
        "loss 仍近乎直线下降：步长太小，训练几乎还没有展开",
    ),
    "long_warmup": ("much of the training was warmup", "warmup 占了训练的很大一部分"),
    "waits_for_data": ("the device waits for data", "设备在等待数据加载"),
    "computes": ("the time goes into computing, not into loading", "时间主要花在计算上，而不是数据加载"),
    "evaluation": ("the time goes into evaluation", "时间主要花在验证上"),
}

ACTIONS: Final = {
    "raise": ("raise {parameter}", "提高 {parameter}"),
    "lower": ("lower {parameter}", "降低 {parameter}"),
    "set": ("set {parameter}", "改用 {parameter}"),
    "keep_ratio": ("keep the ratio to lora_r: {parameter}", "保持与 lora_r 的比例：{parameter}"),
    "adapters_float32": ("or keep only the adapters in float32", "或仅将 LoRA 参数保持为 float32"),
    "stop_at_best": ("stop early, at epoch {after}", "早停：取 epoch {after} 的模型"),
    "finish": ("let it run all {after} epochs", "跑完全部 {after} 个 epoch"),
    "check": ("check that {parameter} names the intended modules", "检查 {parameter} 是否选对了模块"),
}
