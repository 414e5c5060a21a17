"""The frames of frozen ears, kept on a disk in the cache's format, for a SALMONN that is trained without a teacher.

The first epoch's ears are the last: a step reads what they heard. Knows no target and no LLM.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from distill.caching.capture import frame_features
from distill.caching.job import FIGURES, Job
from distill.config import Config
from distill.teacher import resolve_ears
from distill.training.ranks import resolve_precision
from shards.sample import Sample
from shards.streaming.catalog import hash_shards
from shards.targets.header import CacheHeader
from shards.targets.record import TargetRecord, identify_sample
from shards.targets.store import TargetReader, TargetWriter
from shards.tars.source import expand_shards, join_place
from students.ears import EARS
from teachers.cached import read_frames
from teachers.files.identity import FRONT_END
from teachers.files.loading import hash_frozen_parts
from teachers.salmonn import Salmonn
from teachers.targets import NO_CODEC, Targets
from teachers.teacher import Teacher
from teachers.words.batch import Batch, pad_waveforms
from teachers.words.vocabulary import Vocabulary


class KeptFrames(Teacher):
    """Stands where there is no teacher, and brings the ears' frames along.

    Args:
        folder: the folder of the frames.
        header: the header of what this run's ears make.
        model: that hears with them.

    Raises:
        ValueError: the folder holds frames of other ears.
    """

    needs_audio = False
    vocab = rows = identity = None  # of one that is made: see below

    def __init__(self, folder: str | Path, header: CacheHeader, model: Salmonn):
        self.cache_folder = folder
        self.reader = TargetReader(folder, header)
        self.vocab, self.rows = Vocabulary.of(model.tokenizer), model.rows
        self.identity = {"frames": header.fingerprint}

    def label(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[bool]]:
        """The samples as they are: every answer is a label."""
        return list(samples), [False] * len(samples)

    def targets(self, batch: Batch, frames: list[torch.Tensor] | None = None) -> Targets:
        """The batch's frames, each checked against the clip it is of.

        Raises:
            ValueError: a clip has none, or they are of another audio.
        """
        records = [sample.targets for sample in batch.samples]
        for record, sample in zip(records, batch.samples):
            record.check(identify_clip(sample), f"{self.cache_folder}: {sample.key}")
        kept = read_frames(batch, records, batch.labels_S.device, self.cache_folder)
        nothing_S = torch.zeros(0, device=batch.labels_S.device)
        return Targets(None, None, [], nothing_S, frames=kept)


class FrameCapture:
    """Runs the ears over samples; a clip's frames depend on the clip alone.

    Args:
        model: with frozen ears.
        config: the configuration of the run.
    """

    def __init__(self, model: Salmonn, config: Config):
        self.model, self.length = model, (model.config.windows, model.config.ears_seconds)
        self.dtype = resolve_precision(config.precision)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> dict[str, TargetRecord]:
        """Each sample's record, of frames alone, by key."""
        device = self.model.device
        waveforms_BN, num_samples_B = pad_waveforms([sample.waveform_N for sample in samples])
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            frames = self.model.frames(waveforms_BN.to(device), num_samples_B.to(device))
        return {
            sample.key: TargetRecord.of_features(
                identify_clip(sample), frame_features(self.model, b, sample, frames, *self.length)
            )
            for b, sample in enumerate(samples)
        }


def keep_frames(config: Config, model: Salmonn, accelerator) -> KeptFrames:
    """Write the frames of every training clip that has none yet, with whatever processes there are."""
    folder, shards = frames_folder(config), expand_shards(config.shards("train"))
    header = describe_kept_frames(model, config)
    writer = TargetWriter(folder, header, hash_shards(shards), FIGURES)
    if accelerator.is_main_process:
        writer.publish()
    missing = [shard for shard in shards if not writer.is_done(shard)]
    accelerator.wait_for_everyone()  # until every rank has looked
    if missing:
        job = Job(config, FrameCapture(model, config), writer, missing, accelerator)
        job.run(first=accelerator.process_index * len(missing) // accelerator.num_processes)
    accelerator.wait_for_everyone()
    return KeptFrames(folder, header, model)


def frames_folder(config: Config) -> str | Path:
    """Where a data folder keeps the frames of a teacher that is being trained."""
    return join_place(config.data.folder, "frames")


def describe_kept_frames(model: Salmonn, config: Config) -> CacheHeader:
    """Everything that the frames depend on; what only targets have stands there as nothing."""
    nothing = dict.fromkeys(("tokenizer", "prompts", "answers"))
    return CacheHeader(
        {
            **nothing,
            "teacher_weights": hash_frozen_parts(model, EARS),
            "teacher_config": {"front_end": model.config.front_end},
            "front_end": FRONT_END,
            "dtype": str(resolve_precision(config.precision)),
            "ears": resolve_ears(config, is_kept=True),
            "codec": {"name": NO_CODEC},
            "features": {"queries": "none", "hidden_layers": [], "frames": config.cache.frames,
                         "windows": model.config.windows, "ears_seconds": model.config.ears_seconds},
        }
    )  # fmt: skip


def identify_clip(sample: Sample) -> str:
    """What frames belong to: the audio, whatever is asked and answered about it."""
    return identify_sample(sample.sha256, (), ())
