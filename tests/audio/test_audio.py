"""What is decoded, what is refused and why, and that nothing is lost on the way."""

import json
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
from clips import to_bytes, tone

from shards.audio.container import CONTAINERS
from shards.audio.decode import decode_audio, encode_flac, hash_waveform, load_audio, mix_down, to_int16
from shards.audio.limits import AudioError, AudioLimits
from shards.audio.parts import Container, Part

FLAC = to_bytes(tone(5.0) + 0.01 * np.random.default_rng(0).normal(size=80_000).astype(np.float32), form="FLAC")
WAV = to_bytes(tone(5.0))
LONG_OGG = to_bytes(
    np.random.default_rng(0).uniform(-0.5, 0.5, 160_000).astype(np.float32), form="OGG", subtype="VORBIS"
)
MP3 = to_bytes(tone(5.0), form="MP3", subtype="MPEG_LAYER_III")
OGG = to_bytes(tone(5.0), form="OGG", subtype="VORBIS")


def refusal(data: bytes, limits: AudioLimits = AudioLimits()) -> AudioError:  # noqa: B008
    with pytest.raises(AudioError) as caught:
        decode_audio(data, name="train-000000.tar: key", limits=limits)
    return caught.value


def with_sample(value: float) -> bytes:
    waveform_N = tone(1.0)
    waveform_N[8_000] = value
    return to_bytes(waveform_N, subtype="FLOAT")


def with_wav_rate(rate: int) -> bytes:
    return WAV[:24] + struct.pack("<I", rate) + WAV[28:]


@pytest.mark.parametrize(
    ("reason", "data"),
    {
        "empty file": ("decode", b""),
        "garbage": ("decode", bytes(range(256)) * 40),
        "html page": ("decode", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        "header-only flac": ("decode", FLAC[:42]),
        "flac cut in its data": ("truncated", FLAC[: len(FLAC) // 2]),
        "wav cut in its data": ("truncated", WAV[: len(WAV) // 2]),
        "ogg cut in a page": ("truncated", OGG[: len(OGG) // 2]),
        "ogg without its last page": ("truncated", LONG_OGG[: LONG_OGG.rindex(b"OggS")]),
        "mp3 cut in half": ("truncated", MP3[: len(MP3) // 2]),
        "wav of no samples": ("too_short", to_bytes(np.zeros(0, np.float32))),
        "one sample": ("too_short", to_bytes(np.ones(1, np.float32))),
        "under a tenth of a second": ("too_short", to_bytes(tone(0.09))),
        "nan": ("nonfinite", with_sample(np.nan)),
        "infinity": ("nonfinite", with_sample(-np.inf)),
        "integers as floats": ("out_of_range", with_sample(32_767.0)),
        "over thirty seconds": ("too_long", to_bytes(tone(31.0, 8_000), 8_000)),
        "below 8 kHz": ("impossible_rate", with_wav_rate(4_000)),
        "above 192 kHz": ("impossible_rate", with_wav_rate(1_035_904)),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_audio_is_refused_with_its_reason_and_the_name_of_the_sample(reason, data):
    error = refusal(data)
    assert error.reason == reason
    assert "train-000000.tar: key" in str(error)


def test_an_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(refusal(b"")))
    assert (error.reason, str(error)) == ("decode", str(refusal(b"")))


def test_an_hour_in_a_few_kilobytes_is_refused_before_it_is_decoded():
    bomb = to_bytes(np.zeros(3601 * 8_000, np.int16), 8_000, form="FLAC")
    assert len(bomb) < 200_000
    tracemalloc.start()
    try:
        assert refusal(bomb).reason == "too_large"
        assert refusal(bomb, AudioLimits(cut=True)).reason == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # bytes; decoded it is 115 MB
    finally:
        tracemalloc.stop()


def test_many_channels_are_refused_before_they_are_decoded():
    data = to_bytes(np.zeros((16_000, 8), np.float32))
    assert refusal(data, AudioLimits(max_decoded_bytes=100_000)).reason == "too_large"


def test_a_flac_that_announces_more_than_it_has_is_refused():
    position = 21  # of the number of samples in STREAMINFO: the low 36 bits of eight bytes from byte 18
    assert struct.unpack(">I", FLAC[position + 1 : position + 5])[0] == 80_000
    longer = FLAC[: position + 1] + struct.pack(">I", 81_600) + FLAC[position + 5 :]
    assert refusal(longer).reason == "truncated"


def test_a_wav_written_to_a_pipe_has_no_length_and_is_read_to_its_end():
    piped = bytearray(WAV)
    position = piped.index(b"data") + 4
    piped[position : position + 4] = b"\xff\xff\xff\xff"
    np.testing.assert_array_equal(decode_audio(bytes(piped), name="pipe"), decode_audio(WAV, name="file"))


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("WAV", "FLOAT")])
def test_sixteen_bit_samples_at_16_khz_come_through_unchanged(form, subtype):
    samples_N = np.random.default_rng(1).integers(-32_768, 32_768, 16_000).astype(np.int16)
    stored = samples_N if subtype == "PCM_16" else (samples_N / np.float32(32_768)).astype(np.float32)
    waveform_N = decode_audio(to_bytes(stored, form=form, subtype=subtype), name="clip")
    assert waveform_N.dtype == np.float32
    np.testing.assert_array_equal(to_int16(waveform_N), samples_N)


def test_a_flac_of_ours_has_the_hash_of_what_it_was_made_of_and_always_the_same_bytes():
    waveform_N = tone(1.0, level=0.9)
    again_N = decode_audio(encode_flac(waveform_N), name="clip")
    assert hash_waveform(again_N) == hash_waveform(waveform_N)
    assert encode_flac(again_N) == encode_flac(waveform_N) == encode_flac(to_int16(waveform_N))
    assert hash_waveform(to_int16(waveform_N)) == hash_waveform(waveform_N)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_resampling_keeps_length_and_pitch(rate):
    waveform_N = decode_audio(to_bytes(tone(1.0, rate), rate), name="clip")
    assert abs(len(waveform_N) - 16_000) <= 1
    middle_N = waveform_N[4_000:12_000]
    np.testing.assert_allclose(middle_N, tone(1.0)[4_000:12_000], atol=2e-3)


def test_overshoot_of_resampling_stays_within_range():
    square_N = np.sign(tone(1.0, 44_100, level=1.0)).astype(np.float32)
    waveform_N = decode_audio(to_bytes(square_N, 44_100), name="clip")
    assert np.abs(waveform_N).max() <= 1.0


def test_channels_are_averaged_and_the_left_is_taken_where_they_cancel():
    left_N, right_N = tone(1.0), tone(1.0, frequency=300.0)
    np.testing.assert_array_equal(mix_down(np.stack([left_N, right_N], 1)), (left_N + right_N) / 2)
    np.testing.assert_array_equal(mix_down(np.stack([left_N, -left_N], 1)), left_N)


def test_eight_channels_give_one_waveform_not_a_batch():
    samples_NC = np.stack([tone(0.5, frequency=100.0 * (c + 1)) for c in range(8)], 1)
    assert decode_audio(to_bytes(samples_NC), name="clip").shape == (8_000,)


def test_silence_is_decoded_because_only_the_label_can_say_whether_it_is_wanted():
    assert not decode_audio(to_bytes(np.zeros(16_000, np.float32)), name="clip").any()


def test_recordings_of_one_sample_are_joined_with_a_tenth_of_a_second_of_silence(tmp_path):
    (tmp_path / "a.wav").write_bytes(to_bytes(tone(0.5)))
    (tmp_path / "b.wav").write_bytes(to_bytes(tone(0.25, 8_000), 8_000))
    waveform_N = load_audio([tmp_path / "a.wav", tmp_path / "b.wav"])
    assert len(waveform_N) == 8_000 + 1_600 + 4_000
    np.testing.assert_array_equal(waveform_N[8_000:9_600], 0.0)
    np.testing.assert_array_equal(waveform_N[:8_000], decode_audio(to_bytes(tone(0.5)), name="a"))


def test_a_clip_under_one_window_is_padded_to_it(tmp_path):
    (tmp_path / "a.wav").write_bytes(to_bytes(tone(0.2)))
    waveform_N = load_audio([tmp_path / "a.wav"])
    assert len(waveform_N) == 5_334
    np.testing.assert_array_equal(waveform_N[3_200:], 0.0)


def test_a_longer_clip_is_cut_only_when_asked(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(to_bytes(tone(20.0, 8_000), 8_000))
    with pytest.raises(AudioError, match="at most 30 s"):
        load_audio([path, path])
    assert len(load_audio([path, path], limits=AudioLimits(cut=True))) == 480_000


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_a_part_of_a_long_recording_is_what_the_whole_has_there(tmp_path, form, subtype):
    path = tmp_path / "long"
    chirp_N = np.sin(np.arange(60 * 16_000) ** 1.5 / 3e3).astype(np.float32) * 0.5
    path.write_bytes(to_bytes(chirp_N, form=form, subtype=subtype))
    waveform_N = load_audio([path], start=40.0, end=42.5)
    assert len(waveform_N) == 40_000
    np.testing.assert_allclose(waveform_N, soundfile.read(path, dtype="float32")[0][640_000:680_000], atol=1e-6)
    with pytest.raises(AudioError) as caught:
        load_audio([path], start=58.0, end=61.0)
    assert caught.value.reason == "truncated"


@pytest.mark.shared
def test_every_odd_file_gets_the_verdict_its_listing_implies(shared):
    # libsndfile guesses the length of an MP3 without an index, and stops where a wrong header says; the walk does not
    verdicts = {"ok": None, "decode_error": "decode", "open_error": "decode", "header_mismatch": None}
    true_frames = {"audio/flac_test__faulty__05_-_wrong_total_number_of_samples.flac": 109_487}
    for file in json.loads((shared / "data/odd/files.json").read_text()):
        data = (shared / "data/odd" / file["path"]).read_bytes()
        expected = verdicts[file["status"].partition(":")[0]]
        if expected is None:
            seconds = true_frames.get(file["path"], file["decoded_frames"]) / file["sr"]
            assert abs(len(decode_audio(data, name=file["path"])) / 16_000 - seconds) < 1e-3, file["path"]
        else:
            assert refusal(data).reason == expected, file["path"]


def test_a_toy_container_is_one_line_and_is_decoded(monkeypatch):
    def walk(data, start):
        if data[start : start + 4] != b"TOY!":
            return None
        return [Part((memoryview(data)[start + 4 :],), frames=8_000)]

    sound = to_bytes(tone(0.5))
    with pytest.raises(AudioError, match="cannot be decoded"):
        decode_audio(b"TOY!" + sound, name="a")
    monkeypatch.setitem(CONTAINERS, "toy", Container(walk, ("WAV",)))
    assert np.array_equal(decode_audio(b"TOY!" + sound, name="a"), decode_audio(sound, name="a"))
