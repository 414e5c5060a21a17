"""The whole sound of a file comes out, or a finding names it: containers, ways of writing, and damage.

Every file is made here, of samples and bytes, so its length is known by construction.
"""

import io
import struct

import numpy as np
import pytest
import soundfile
from clips import to_bytes, tone

from shards.audio.container import read_header, read_samples, read_segment
from shards.audio.decode import load_audio
from shards.audio.limits import AudioError, AudioLimits
from shards.manifests.manifest import Entry
from shards.packing.stats import measure_seconds

RATE = 16_000
LIMITS = AudioLimits(max_seconds=60.0)
NOISE = np.random.default_rng(0).uniform(-0.4, 0.4, 2 * RATE).astype(np.float32)
CLIP = np.concatenate([np.zeros(2 * RATE, np.float32), NOISE, tone(2.0)])  # a variable rate begins low
SHORT = CLIP[-30_000:]
TAG = b"ID3\x04\0\0\0\0\0\x14" + b"\xff\xf3\x88\xc4" * 5  # with what looks like frames in it
MP3_SLACK = 576 + 529  # a frame and the decoder's delay


def to_mp3(samples_N: np.ndarray, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    mode = {"bitrate_mode": "VARIABLE", "compression_level": 0.5}
    channels = 1 if samples_N.ndim == 1 else samples_N.shape[1]
    with soundfile.SoundFile(buffer, "w", rate, channels, "MPEG_LAYER_III", None, "MP3", **mode) as file:
        file.write(samples_N)
    return buffer.getvalue()


def frame_starts(mp3: bytes) -> list[int]:
    """Of an MPEG 2 layer III file without tags."""
    kilobits = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    starts = [0]
    while starts[-1] < len(mp3):
        third = mp3[starts[-1] + 2]
        starts.append(starts[-1] + 72 * kilobits[third >> 4] * 1000 // RATE + (third >> 1 & 1))
    return starts


def put(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def wav_of(form: bytes, *chunks: tuple[bytes, bytes], mark: bytes = b"RIFF") -> bytes:
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return (
        mark + struct.pack("<I", 12 + len(form) + len(body)) + b"WAVEfmt " + struct.pack("<I", len(form)) + form + body
    )


PCM = (CLIP * 32_767).astype("<i2").tobytes()
FORM = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
WAV = wav_of(FORM, (b"data", PCM))
LIST = (b"LIST", b"INFOISFT\x06\0\0\0tests\0")
RF64 = to_bytes(CLIP, form="RF64")
FLAC = to_bytes(CLIP, form="FLAC")
FLAC_OPEN = put(put(FLAC, 21, bytes([FLAC[21] & 0xF0])), 22, b"\0\0\0\0")
VORBIS, OPUS = (to_bytes(CLIP, form="OGG", subtype=subtype) for subtype in ("VORBIS", "OPUS"))
MP3 = to_mp3(CLIP)
STARTS = frame_starts(MP3)
BARE = MP3[STARTS[1] :]  # without the index frame
MP3_FRAMES = len(STARTS) - 2
EXTRA = MP3_FRAMES * 576 - len(CLIP)  # what encoder and decoder add where no tag says so
EVEN = to_bytes(CLIP, form="MP3", subtype="MPEG_LAYER_III")


def silent_frames(head: bytes, size: int, count: int) -> bytes:
    return (head + b"\0" * (size - 4)) * count


WHOLE = {  # samples, or (samples, slack) where the container tells them to a frame only
    "wav": (WAV, 96_000),
    **{
        f"wav whose data length is {size:#x}": (put(WAV, 40, struct.pack("<I", size)), 96_000)
        for size in (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFDB)
    },
    "wav whose outer length is 0": (put(WAV, 4, b"\0\0\0\0"), 96_000),
    "wav of a pipe with LIST behind": (put(wav_of(FORM, (b"data", PCM), LIST), 40, b"\xff" * 4), 96_000),
    "wav with LIST before and behind": (wav_of(FORM, LIST, (b"data", PCM), LIST), 96_000),
    "wav of two data chunks": (wav_of(FORM, (b"data", PCM), LIST, (b"data", PCM[:60_000])), 126_000),
    "two wavs": (WAV + wav_of(FORM, (b"data", PCM[:60_000])), 126_000),
    "two wavs of pipes": (put(WAV, 40, b"\xff" * 4) + put(WAV, 40, b"\0" * 4), 192_000),
    "wav with half a sample": (wav_of(FORM, (b"data", PCM + b"\1")), 96_000),
    "wav with an ID3v1 tag": (WAV + b"TAG" + b"x" * 125, 96_000),
    "extensible wav": (to_bytes(CLIP, form="WAVEX"), 96_000),
    "rf64": (RF64, 96_000),
    "bw64": (b"BW64" + RF64[4:], 96_000),
    "two rf64": (RF64 + RF64, 192_000),
    "mu-law wav": (to_bytes(CLIP, subtype="ULAW"), 96_000),
    "float wav of a pipe": (
        (lambda wav: put(wav, wav.index(b"data") + 4, b"\xff" * 4))(to_bytes(CLIP, subtype="FLOAT")), 96_000),
    "aiff": (to_bytes(CLIP, form="AIFF"), 96_000),
    "two aiffs": (to_bytes(CLIP, form="AIFF") * 2, 192_000),
    "au": (to_bytes(CLIP, form="AU"), 96_000),
    "au of a pipe": (put(to_bytes(CLIP, form="AU"), 8, b"\xff" * 4), 96_000),
    "two aus": (to_bytes(CLIP, form="AU") * 2, 192_000),
    "w64": (to_bytes(CLIP, form="W64"), 96_000),
    "two w64s": (to_bytes(CLIP, form="W64") * 2, 192_000),
    "caf": (to_bytes(CLIP, form="CAF"), 96_000),
    "two cafs": (to_bytes(CLIP, form="CAF") * 2, 192_000),
    "sphere": (to_bytes(CLIP, form="NIST"), 96_000),
    "two spheres": (to_bytes(CLIP, form="NIST") * 2, 192_000),
    "flac": (FLAC, 96_000),
    "flac of a pipe": (FLAC_OPEN, 96_000),
    "two flacs": (FLAC + to_bytes(SHORT, form="FLAC"), 126_000),
    "two flacs of pipes": (FLAC_OPEN + FLAC_OPEN, 192_000),
    "flac behind an ID3 tag": (TAG + FLAC, 96_000),
    "flac that announces less": (put(FLAC, 22, struct.pack(">I", 50_000)), 96_000),
    "flac of 24 bits": (to_bytes(CLIP, form="FLAC", subtype="PCM_24"), 96_000),
    "flac of 8 bits": (to_bytes(CLIP, form="FLAC", subtype="PCM_S8"), 96_000),
    "vorbis": (VORBIS, 96_000),
    "two vorbis streams": (VORBIS + to_bytes(SHORT, form="OGG", subtype="VORBIS"), 126_000),
    "opus": (OPUS, 96_000),
    "two opus streams": (OPUS + to_bytes(SHORT, form="OGG", subtype="OPUS"), 126_000),
    "vorbis and opus": (VORBIS + OPUS, 192_000),
    "mp3": (MP3, 96_000),
    "even mp3": (EVEN, 96_000),
    "mp3 without its index": (BARE, (96_000 + EXTRA, MP3_SLACK)),
    "mp3 whose index announces less": (put(MP3, 21, struct.pack(">I", 50)), 96_000),
    "mp3 whose index counts itself": (put(MP3, 21, struct.pack(">I", MP3_FRAMES + 1)), 96_000),
    "two mp3s": (MP3 + to_mp3(SHORT), 126_000),
    "two mp3s without index": (BARE + BARE, (2 * (96_000 + EXTRA), MP3_SLACK)),
    "mp3 and one without index": (MP3 + BARE, (96_000 + 96_000 + EXTRA, MP3_SLACK)),
    "tags before, between and behind": (TAG + MP3 + TAG + MP3 + b"TAG" + b"x" * 125, 192_000),
    "zeros among the frames": (BARE[:STARTS[50]] + BARE[STARTS[50]:] + b"\0" * 512, (96_000 + EXTRA, MP3_SLACK)),
    "strange bytes, but all frames": (MP3[: STARTS[60]] + b"what?" * 300 + MP3[STARTS[60] :], 96_000),
    "mpeg 1 layer II": (silent_frames(b"\xff\xfd\x84\xc4", 384, 100), (115_200, 1152)),
    "mpeg 1 layer I": (silent_frames(b"\xff\xff\x44\xc4", 128, 100), (38_400, 384)),
    "free format": (silent_frames(b"\xff\xfb\x04\xc4", 400, 100), (115_200, 1152 + 529)),
    "mpeg 2.5": (silent_frames(b"\xff\xe3\x88\xc4", 576, 100), (57_600, 576 + 529)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_sound_comes_out(name):
    data, expected = WHOLE[name]
    expected, slack = expected if isinstance(expected, tuple) else (expected, 0)
    samples_NC, header = read_samples(data, name=name, limits=LIMITS)
    assert abs(len(samples_NC) - expected) <= slack
    assert abs(header.frames - expected) <= slack
    assert not header.is_hash_wrong
    if expected == 126_000 or name in ("wav", "flac", "flac of a pipe", "bw64", "flac of 24 bits"):
        close = 0.15 if "mp3" in name or "opus" in name or "vorbis" in name else 1e-3
        np.testing.assert_allclose(samples_NC[66_000:95_000, 0], CLIP[66_000:95_000], atol=close)
    if expected == 126_000:
        np.testing.assert_allclose(samples_NC[-1000:, 0], SHORT[-1000:] if "wav" not in name else CLIP[29_000:30_000],
                                   atol=0.15)  # fmt: skip


def cut(data: bytes, share: float = 0.5) -> bytes:
    return data[: int(len(data) * share)]


def without(data: bytes, start: int, end: int) -> bytes:
    return data[:start] + data[end:]


PAGES = [at for at in range(len(VORBIS)) if VORBIS.startswith(b"OggS", at)]
DAMAGED = {
    "wav cut": cut(WAV),
    "wav whose data length is 1000": put(WAV, 40, struct.pack("<I", 1000)),
    "wav whose data length is two too small": put(WAV, 40, struct.pack("<I", len(PCM) - 2)),
    "wav whose data length is too large": put(WAV, 40, struct.pack("<I", len(PCM) + 2)),
    "wav whose data length takes in another": put(WAV, 40, struct.pack("<I", len(PCM) + 30_000)) + WAV,
    "rf64 cut": cut(RF64),
    "aiff cut": cut(to_bytes(CLIP, form="AIFF")),
    "au cut": cut(to_bytes(CLIP, form="AU")),
    "au that announces less": put(to_bytes(CLIP, form="AU"), 8, struct.pack(">I", 9_000)),
    "w64 cut": cut(to_bytes(CLIP, form="W64")),
    "caf cut": cut(to_bytes(CLIP, form="CAF")),
    "sphere cut": cut(to_bytes(CLIP, form="NIST")),
    "voc, which no walk counts": to_bytes(CLIP, form="VOC"),
    "flac cut": cut(FLAC),
    "flac of a pipe, cut": cut(FLAC_OPEN),
    "flac of a pipe, cut in its last frame": FLAC_OPEN[:-50],
    "flac of a pipe that lacks frames": without(FLAC_OPEN, 40_000, 60_000),
    "flac that lacks frames": without(FLAC, 40_000, 60_000),
    "flac that announces more": put(FLAC, 22, struct.pack(">I", 97_000)),
    "two flacs, the second cut": FLAC + cut(FLAC),
    "flacs of two rates": FLAC + to_bytes(CLIP, 8_000, form="FLAC"),
    "vorbis cut": cut(VORBIS),
    "vorbis that lacks a page": without(VORBIS, PAGES[2], PAGES[3]),
    "vorbis without its last page": VORBIS[: PAGES[-1]],
    "vorbis with a flipped bit": put(VORBIS, 9_000, bytes([VORBIS[9_000] ^ 1])),
    "two vorbis streams, the second cut": VORBIS + cut(VORBIS, 0.9),
    "opus cut": cut(OPUS),
    "opus with bytes behind": OPUS + b"what is this?",
    "mp3 cut": cut(MP3),
    "mp3 without index, cut": cut(BARE),
    "mp3 that lacks frames": without(MP3, STARTS[80], STARTS[84]),
    "mp3 without index, strange bytes among frames": MP3[STARTS[1] : STARTS[60]] + b"what?" * 300 + MP3[STARTS[60] :],
    "two mp3s, the second cut": MP3 + cut(MP3),
    "mp3s of two rates": MP3 + to_mp3(CLIP, 24_000),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_lost_sound_is_refused_by_name(tmp_path, name):
    path = tmp_path / "clip"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(AudioError, match="clip") as caught:
        load_audio([path], limits=LIMITS)
    assert caught.value.reason in ("truncated", "header_mismatch", "decode")


def with_checksum(page: bytes) -> bytes:
    """The page with the CRC-32 of RFC 3533, bit by bit."""
    page, crc = put(page, 22, b"\0\0\0\0"), 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x104C11DB7 if crc >> 31 else 0)
    return put(page, 22, struct.pack("<I", crc))


@pytest.mark.parametrize("moved", [-40_000, -2_500, 40_000])
@pytest.mark.parametrize("data", [VORBIS, OPUS], ids=["vorbis", "opus"])
def test_a_last_position_that_its_packets_do_not_reach_is_named(data, moved):
    last = data.rindex(b"OggS")
    scale = 3 if data is OPUS else 1
    granule = struct.unpack_from("<Q", data, last + 6)[0] + scale * moved
    changed = data[:last] + with_checksum(put(data[last:], 6, struct.pack("<Q", granule)))
    with pytest.raises(AudioError) as caught:
        read_samples(changed, name="ogg", limits=LIMITS)
    assert caught.value.reason == "header_mismatch"


def test_two_streams_that_sound_at_once_are_named_and_a_silent_one_is_passed_over():
    other = to_bytes(SHORT, form="OGG", subtype="OPUS")
    first, second = VORBIS.index(b"OggS", 4), other.index(b"OggS", 4)
    with pytest.raises(AudioError, match="sound at once"):
        read_samples(VORBIS[:first] + other[:second] + VORBIS[first:] + other[second:], name="ogg", limits=LIMITS)
    page = struct.pack("<4sBBQIII", b"OggS", 0, 6, 0, 7, 0, 0) + b"\1\x08fishead\0"
    skeleton = with_checksum(page)
    samples_NC, _ = read_samples(VORBIS[:first] + skeleton + VORBIS[first:], name="ogg", limits=LIMITS)
    assert len(samples_NC) == len(CLIP)


def test_a_flac_whose_md5_is_of_other_samples_is_told_and_one_that_also_announces_others_refused():
    wrong = put(FLAC, 26, b"\1" * 16)
    assert read_samples(wrong, name="flac", limits=LIMITS)[1].is_hash_wrong
    with pytest.raises(AudioError, match="nor their MD5"):
        read_samples(put(wrong, 22, struct.pack(">I", 50_000)), name="flac", limits=LIMITS)


@pytest.mark.parametrize("name", ["mp3 without its index", "two flacs", "two opus streams", "two wavs of pipes"])
def test_parts_and_lengths_of_a_recording_are_those_of_its_whole_sound(tmp_path, name):
    path = tmp_path / "clip"
    path.write_bytes(WHOLE[name][0])
    whole_NC, header = read_samples(WHOLE[name][0], name=name, limits=LIMITS)
    assert abs(read_header(path).frames - len(whole_NC)) <= MP3_SLACK
    if "mp3" in name or "pipes" in name:  # whose headers tell nothing
        assert next(measure_seconds([Entry(path, "one", "asr")], workers=1)) == pytest.approx(header.seconds, abs=0.1)
    seconds = len(whole_NC) / RATE
    part_NC, _ = read_segment(path, seconds - 3.0, seconds - 0.5, limits=LIMITS)
    start = round((seconds - 3.0) * RATE)
    np.testing.assert_allclose(part_NC, whole_NC[start : start + len(part_NC)], atol=2e-3)
    assert len(part_NC) == 40_000
