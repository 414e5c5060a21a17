"""Augmented audio is finite, within [-1, 1], what its options say, and the same on any rank, worker and resume."""

import itertools

import numpy as np
import pytest
import torch
from tars import make_waveform, write_shards

from shards.audio.augment import add_noise, add_room, augment, change_speed, draw_mask, mask_mel_, sample_seed
from shards.audio.augmentation import Augmentation
from shards.sample import MAX_SECONDS, SAMPLE_RATE
from shards.streaming.limits import Limits
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream
from teachers.ears.beats import BeatsEar
from teachers.ears.eat import EatConfig, EatEar
from teachers.ears.whisper import WhisperEar

ALL = Augmentation(speed_share=1, room_share=1, noise_share=1, gain_share=1)
TONE = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)).astype(np.float32)


def power_db(waveform_N):
    return 10 * np.log10(np.square(waveform_N, dtype=np.float64).mean())


@pytest.mark.parametrize(
    "waveform_N",
    [
        TONE,
        np.ones(5333, np.float32),
        np.sign(TONE + 1e-9).astype(np.float32),
        np.zeros(16_000, np.float32),
        np.full(1600, 1e-30, np.float32),
        np.eye(1, 4800, 100, dtype=np.float32)[0],
        np.tile(TONE, 30),
    ],
    ids=["tone", "ones", "square", "silence", "denormal", "click", "30 s"],
)
def test_output_is_finite_and_within_range(waveform_N):
    loud = Augmentation(
        1,
        (0.5, 2.0),
        room_share=1,
        room_range=(0.02, 3.0),
        noise_share=1,
        noise_range=(-40, 0),
        gain_share=1,
        gain_range=(0, 60),
    )
    for seed in range(4):
        out_N = augment(waveform_N, loud, seed=seed)
        assert out_N.dtype == np.float32 and np.isfinite(out_N).all() and np.abs(out_N).max() <= 1
        assert 0 < len(out_N) <= MAX_SECONDS * SAMPLE_RATE


def test_nothing_happens_where_no_share_is_set():
    assert np.array_equal(augment(TONE, Augmentation(), seed=1), TONE)


def test_the_same_seed_epoch_and_key_sound_the_same_and_others_do_not():
    first = augment(TONE, ALL, seed=sample_seed(1, 2, "key"))
    assert np.array_equal(first, augment(TONE, ALL, seed=sample_seed(1, 2, "key")))
    for other in ((2, 2, "key"), (1, 3, "key"), (1, 2, "kez")):
        assert not np.array_equal(first, augment(TONE, ALL, seed=sample_seed(*other)))


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_noise_is_at_the_asked_ratio(snr_db):
    noise_N = add_noise(TONE, snr_db, np.random.default_rng(0)).astype(np.float64) - TONE
    assert power_db(TONE) - power_db(noise_N) == pytest.approx(snr_db, abs=1e-3)


def test_gain_is_as_asked_and_never_overflows():
    for gain_db in (-12.0, 6.0):
        out_N = augment(TONE, Augmentation(gain_share=1, gain_range=(gain_db, gain_db)), seed=0)
        assert power_db(out_N) - power_db(TONE) == pytest.approx(gain_db, abs=0.03)
    out_N = augment(TONE, Augmentation(gain_share=1, gain_range=(40, 40)), seed=0)
    assert np.corrcoef(out_N, TONE)[0, 1] > 0.999999 and np.abs(out_N).max() == 1  # scaled, not clipped


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_length_and_pitch(speed):
    out_N = change_speed(TONE, speed)
    assert len(out_N) == pytest.approx(len(TONE) / speed, abs=1)
    spectrum = np.abs(np.fft.rfft(out_N * np.hanning(len(out_N))))
    assert spectrum.argmax() * SAMPLE_RATE / len(out_N) == pytest.approx(1000 * speed, abs=2)


def test_slowing_down_never_cuts_the_end_of_a_clip():
    waveform_N = np.zeros(29 * SAMPLE_RATE, np.float32)
    waveform_N[-100] = 1
    out_N = change_speed(waveform_N, 0.9)
    assert len(out_N) == MAX_SECONDS * SAMPLE_RATE and np.abs(out_N[-400:]).max() > 0.5


def test_speed_keeps_a_clip_within_what_the_ears_take():
    assert len(change_speed(TONE, 0.5, max_seconds=1.25)) == 1.25 * SAMPLE_RATE
    assert len(change_speed(TONE, 2.0)) == SAMPLE_RATE // 2
    assert len(change_speed(TONE[:8000], 2.0)) == pytest.approx(SAMPLE_RATE / 3, abs=1)  # one Q-Former window
    assert len(change_speed(TONE[:2000], 2.0)) == 2000


def test_a_room_decays_by_60_db_in_its_time():
    click_N = np.zeros(SAMPLE_RATE, np.float32)
    click_N[0] = 1
    out_N = add_room(click_N, 0.5, np.random.default_rng(0))
    assert power_db(out_N) == pytest.approx(power_db(click_N), abs=1e-3)
    early, late = (power_db(out_N[int(t * SAMPLE_RATE) :][:800]) for t in (0.1, 0.4))
    assert early - late == pytest.approx(60 * 0.3 / 0.5, abs=2)
    assert np.abs(out_N[SAMPLE_RATE // 2 + 1 :]).max() < 1e-5


def test_shares_are_kept_and_one_does_not_move_the_others():
    quiet = {"speed_range": (1, 1), "gain_range": (-6, -6)}
    changed = [
        not np.array_equal(augment(TONE, Augmentation(gain_share=0.3, **quiet), seed=seed), TONE) for seed in range(300)
    ]
    assert 60 < sum(changed) < 120
    more = [augment(TONE, Augmentation(gain_share=0.3, speed_share=1, **quiet), seed=seed) for seed in range(40)]
    assert [power_db(out_N) < power_db(TONE) - 1 for out_N in more] == changed[:40]


@pytest.mark.parametrize("teacher_hears", ["clean", "same"])
def test_the_teacher_hears_what_the_config_says(tmp_path, teacher_hears):
    write_shards(tmp_path, [3])
    plain = {s.key: s for s in next(iter(ShardStream(tmp_path, Order(batch_size=3))))}
    augmentation = Augmentation(noise_share=1, gain_share=1, mask_share=1, teacher_hears=teacher_hears)
    for sample in next(iter(ShardStream(tmp_path, Order(batch_size=3), augmentation=augmentation))):
        heard = sample.as_the_teacher_hears_it
        assert sample.mel_mask is not None and (heard.mel_mask is None) == (teacher_hears == "clean")
        assert not np.array_equal(sample.waveform_N, plain[sample.key].waveform_N)
        assert sample.sha256 == plain[sample.key].sha256
        if teacher_hears == "clean":
            assert np.array_equal(heard.waveform_N, plain[sample.key].waveform_N)
        else:
            assert heard is sample


def test_augmented_samples_do_not_depend_on_ranks_workers_or_order(tmp_path):
    write_shards(tmp_path, [4, 3])

    def heard(workers=0, ranks=(0, 1), **options):
        order, limits = Order(**options, epochs=2, seed=5), Limits(workers=workers)
        stream = ShardStream(tmp_path, order, None, limits, rank=ranks[0], world_size=ranks[1], augmentation=ALL)
        return {(s.key, s.epoch): s.waveform_N.tobytes() for s in itertools.chain.from_iterable(stream)}

    alone = heard(batch_size=2)
    assert len(set(alone.values())) == 14  # another sound each epoch
    assert heard(batch_size=3, shuffle=False, workers=2) == alone
    assert heard(batch_size=4, ranks=(0, 2)) | heard(batch_size=4, ranks=(1, 2)) == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_share": 1.5}, "noise_share is 1.5, but a share is 0 to 1"),
        ({"gain_range": (3, -3)}, r"gain_range is \(3\.0, -3\.0\), but it goes from the lower"),
        ({"noise_range": (0, float("nan"))}, "noise_range is"),
        ({"speed_range": (0.0, 1.0)}, "it must lie in 0.5 to 2"),
        ({"teacher_hears": "nothing"}, "teacher_hears is 'nothing'"),
        ({"mask_share": -0.1}, "mask_share is -0.1, but a share is 0 to 1"),
        ({"mask_bands": -1}, "bands, spans and seconds are counted"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


MASKS = [draw_mask(Augmentation(mask_share=1), seconds, seed=seed) for seed, seconds in enumerate((2.0, 0.9, 0.01))]


def test_masked_mels_are_the_mean_in_bands_and_spans_and_padding_stays():
    mel_BMX = torch.randn(3, 80, 200)
    num_frames_B = torch.tensor([200, 90, 1])
    masked_BMX = mel_BMX.clone()
    mask_mel_(masked_BMX, num_frames_B, MASKS)
    for mel_MX, masked_MX, num_frames in zip(mel_BMX, masked_BMX, num_frames_B.tolist()):
        assert torch.equal(mel_MX[:, num_frames:], masked_MX[:, num_frames:])
        changed_MX = (mel_MX != masked_MX)[:, :num_frames]
        assert torch.allclose(masked_MX[:, :num_frames][changed_MX], mel_MX[:, :num_frames].mean(), atol=1e-6)
        bands, spans = changed_MX.all(1), changed_MX.all(0)
        assert torch.equal(changed_MX, bands[:, None] | spans[None, :])
        assert bands.sum() <= 32 and (num_frames == 1 or spans.sum() <= 0.4 * num_frames)
    assert torch.isfinite(masked_BMX).all() and (masked_BMX[0] != mel_BMX[0]).any()


def test_a_mel_is_masked_alike_alone_and_in_a_batch_and_no_mask_changes_nothing():
    mel_BMX = torch.randn(2, 80, 120)
    both_BMX, alone_BMX, none_BMX = mel_BMX.clone(), mel_BMX[1:].clone(), mel_BMX.clone()
    mask_mel_(both_BMX, torch.tensor([120, 100]), MASKS[:2])
    mask_mel_(alone_BMX, torch.tensor([100]), MASKS[1:2])
    mask_mel_(none_BMX, torch.tensor([120, 100]), [None, None])
    assert torch.equal(alone_BMX[0], both_BMX[1]) and torch.equal(none_BMX, mel_BMX)


def test_masks_come_for_their_share_and_within_their_limits():
    options = Augmentation(mask_share=0.4, mask_bands=3, mask_band_share=0.1, mask_spans=1, mask_span_seconds=0.2)
    masks = [draw_mask(options, 4.0, seed=seed) for seed in range(300)]
    drawn = [mask for mask in masks if mask is not None]
    assert 85 < len(drawn) < 155 and len(set(drawn)) == len(drawn)
    for mask in drawn:
        assert len(mask.bands) == 3 and len(mask.spans) == 1
        assert all(0 <= start <= end <= 1 and end - start <= 0.1 for start, end in mask.bands)
        assert all(0 <= start <= end <= 1 and end - start <= 0.05 for start, end in mask.spans)


def test_a_waveform_of_a_shard_survives_every_augmentation():
    for number in range(20):
        out_N = augment(make_waveform(number), ALL, seed=sample_seed(0, 0, str(number)))
        assert np.isfinite(out_N).all() and np.abs(out_N).max() <= 1


EARS = {
    "whisper": lambda: WhisperEar.from_config(
        dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=100)
    ),
    "beats": lambda: BeatsEar.from_config(
        dict(embed_dim=24, encoder_embed_dim=32, encoder_ffn_embed_dim=48, encoder_layers=1, encoder_attention_heads=4)
    ),
    "eat": lambda: EatEar.from_config(EatConfig(embed_dim=32, depth=1, num_heads=4, ffn_dim=64)),
}


@pytest.mark.parametrize("name", EARS)
def test_every_ear_is_masked_row_by_row_and_never_by_default(name):
    torch.manual_seed(0)
    ear = EARS[name]().requires_grad_(False)
    batch = (0.3 * torch.randn(2, SAMPLE_RATE), torch.tensor([SAMPLE_RATE, SAMPLE_RATE]))
    clear_BRE, masked_BRE = ear(*batch)[0], ear(*batch, [None, MASKS[0]])[0]
    assert torch.equal(clear_BRE[0], masked_BRE[0]) and not torch.equal(clear_BRE[1], masked_BRE[1])
    assert masked_BRE.isfinite().all()
