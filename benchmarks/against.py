"""This checkout against another commit: is it slower, and does it compute the same?

`git worktree add --detach ../before 9ab2a91 && python benchmarks/against.py ../before` compares with the last commit
before the packages had rooms, which needs `pip install omegaconf==2.4.0` too. Models, clips and shards are of the
demo's sizes and made by the other checkout, whose work is so read here. Each checkout has a process of its own, on one
thread, and both do the same works part by part by turns: a pack, a batch or a step of one, then the same of the other,
while the first waits. So whatever else runs on the machine meets both alike. Figures are medians, ratios those of the
pairs, the other's seconds by ours: above 1 where ours is faster. Processor time is user and system, of the process that
trains or packs. In each work the last part is not timed; its calls of functions, Python's and torch's, are counted,
which no other work on the machine changes.

Also compared, bit by bit: losses from a cache, from one with frames, and online, on one rank and on two; training from
the other's cache; and a run that the other began. Knows of both only words and functions that both know.
"""

import argparse
import cProfile
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pstats import Stats
from statistics import median, quantiles

OURS = Path(__file__).resolve().parents[1]
CONFIG = """
data: {labelled_share: 0.25}
train: {batch_size: 16, micro_batch_size: 8, learning_rate: 3.0e-3, warmup_steps: 30, save_every: 1000000, trackers: []}
cache: {k: 32, max_new_tokens: 6}
"""
MADE = ["corpus.kind=synth", "corpus.num_train=400", "scratch.steps=1", "scratch.ear_steps=1", "scratch.text_steps=1",
        "scratch.batch_size=16", "scratch.vocab_size=700", "teacher.path=''", "student.llm=''"]  # fmt: skip
FRAMES = ["cache.frames=int8"]
READ = {"epoch": [], "epoch_frames": FRAMES}  # words of the config of an epoch that is only read
TRAINED = {  # and of runs
    "step": [],
    "step_frames": FRAMES,
    "step_worker": [*FRAMES, "data.workers=1"],
    "step_online": ["teacher.online=true"],
}
PARTS = {  # what a work's part is, and how many a round takes
    "pack": ("a pack of 400 clips", 16),
    "cache": ("a cache of 400 clips, three in four with the teacher's own answers", 4),
    "epoch": ("a batch of a cached epoch: read, unpacked, made tensors", 40),
    "epoch_frames": ("the same with int8 frames", 40),
    "step": ("a step from the cache", 30),
    "step_frames": ("a step, int8 frames in the cache", 40),
    "step_worker": ("the same, read by one worker of the stream", 40),
    "step_online": ("a step, the teacher online", 45),
}
WHOLE = ("pack", "cache")  # works whose parts are whole jobs, the first as good as the next
LOSS_STEPS = 8  # of runs that no time is taken of
MARK = "@part "  # of lines that are no progress of a stage
WARM_UP = 3  # steps and batches that no time is taken of
STOPPED = 143  # the exit code of a run that stopped in order before its end
TWO_RANKS = OURS / "configs/accelerate/two_cpus_ddp.yaml"


class Clock:
    """Tells what each part of a work takes, seconds of processor and wall, and waits for this process' next turn."""

    def __init__(self, work: str):
        self.left, self.profile = PARTS[work][1], cProfile.Profile()
        self.wait({"begins": work})

    def wait(self, told: dict) -> None:
        """Say something to the process that gives the turns, and begin a part when it says so."""
        print("\n" + MARK + json.dumps(told), flush=True)
        sys.stdin.readline()
        self.began = time.process_time(), time.perf_counter()

    def note(self) -> None:
        """A part ends, and the next begins; of the last one calls are counted, and no time is taken."""
        now = time.process_time(), time.perf_counter()
        self.profile.disable()
        self.left -= 1
        if self.left:
            self.wait({"took": [after - before for before, after in zip(self.began, now)]})
        else:
            self.wait({"calls": Stats(self.profile).total_calls})
        if self.left == 1:
            self.profile.enable()

    def on_step(self, run, record) -> None:
        """As a run's callback: a step ends."""
        self.note()


def make(config_path: str, words: Sequence[str]) -> None:
    """In a process of one checkout: corpus, shards, teacher and the student's LLM."""
    from distill.config import load_config
    from distill.pipeline import make_shards
    from distill.teach import teach

    config = load_config(config_path, words)
    make_shards(config)
    teach(config)


def fill_caches(config_path: str, words: Sequence[str]) -> None:
    """In a process of one checkout: a cache of targets, and one with frames."""
    from distill.cache import cache
    from distill.config import load_config

    for added in ([], FRAMES):
        cache(load_config(config_path, [*words, *added, *cache_in(words, added)]))


def cache_in(words: Sequence[str], added: Sequence[str]) -> list[str]:
    """The words that name the cache of a work: its own, or the one with frames beside it."""
    (folder,) = (word for word in words if word.startswith("cache.folder="))
    return [folder + "-frames" if FRAMES[0] in added else folder]


def time_works(config_path: str, words: Sequence[str]) -> None:
    """In a process of one checkout: every work, and a clock that tells what its parts take; at last losses of runs."""
    import distill.run as stage
    from distill.config import load_config

    def configure(work: str, added: Sequence[str], folder: Sequence[str] = ()):
        steps = [f"name={work}", f"train.steps={PARTS[work][1]}"]
        return load_config(config_path, [*words, *added, *(folder or cache_in(words, added)), *steps])

    distiller, losses = stage.Distiller, {}
    time_packs(configure("pack", []))
    time_caches(partial(configure, "cache", []), configure("cache", []).run_folder)
    for work, added in READ.items():
        time_batches(stage, configure(work, added), work)
    for work, added in TRAINED.items():
        config = configure(work, added)
        shutil.rmtree(config.run_folder, ignore_errors=True)
        stage.Distiller = partial(distiller, callbacks=[Clock(work)])
        stage.run(config)
        losses[work] = read_losses(config.run_folder)
    print("\n" + MARK + json.dumps({"losses": losses}))


def time_packs(config) -> None:
    """Pack the training manifest into a new folder, several times."""
    from distill.pipeline import pack

    shutil.rmtree(config.run_folder, ignore_errors=True)
    clock = Clock("pack")
    for number in range(PARTS["pack"][1]):
        pack(Path(config.data.folder) / "corpus/train.json", config.run_folder / str(number), workers=1)
        clock.note()


def time_caches(configure: Callable, folder: Path) -> None:
    """Run the caching job into a new folder, several times."""
    from distill.cache import cache

    shutil.rmtree(folder, ignore_errors=True)
    clock = Clock("cache")
    for number in range(PARTS["cache"][1]):
        cache(configure([f"cache.folder={folder}/{number}"]))
        clock.note()


def time_batches(stage, config, work: str) -> None:
    """Batches of the training stream, with their targets as tensors; no model hears or answers."""
    model = stage.load_teacher(config, llm_weights=False)
    student = stage.make_student(config, model, stage.resolve_precision(config.precision), print)
    teacher = stage.wrap_teacher(config, model)
    stream, clock = stage.open_training_stream(config, stage.build_accelerator(), teacher, student), Clock(work)
    for _, samples in zip(range(config.train.steps), stream):
        labelled, _ = teacher.label(samples)
        teacher.targets(student.collate(labelled))
        clock.note()


def read_losses(run_folder: Path) -> list[float]:
    """The losses of a run, step by step."""
    rows = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


class Checkout:
    """One of the two, with a folder of its own for what it makes."""

    def __init__(self, root: Path, folder: Path, material: Path):
        self.root, self.folder, self.config = root, folder, material / "config.yaml"
        made = material / "runs" / "made" / "scratch"
        self.words = [f"data.folder={material}/data", f"teacher.path={made}/teacher", f"student.llm={made}/student-llm",
                      f"runs={folder}/runs", f"cache.folder={folder}/cache"]  # fmt: skip
        self.environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
                            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *command: str | Path, ends: Sequence[int] = (0,)) -> str:
        """Run a command with this checkout's packages; its output.

        Raises:
            RuntimeError: it ended with another exit code; the last lines that it printed.
        """
        done = subprocess.run([sys.executable, *map(str, command)], env=self.environment, cwd=self.folder,
                              text=True, capture_output=True)  # fmt: skip
        if done.returncode not in ends:
            raise RuntimeError(f"{self.root}: " + "\n".join((done.stdout + done.stderr).splitlines()[-8:]))
        return done.stdout

    def open(self, function: Callable) -> subprocess.Popen:
        """Call a function of this file in a fresh process that tells and asks."""
        command = [sys.executable, __file__, "--do", function.__name__, self.config, *self.words]
        return subprocess.Popen([*map(str, command)], env=self.environment, cwd=self.folder, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def do(self, function: Callable, *words: str) -> str:
        """Call a function of this file in a fresh process; its output."""
        return self.start(__file__, "--do", function.__name__, self.config, *self.words, *words)

    def train(self, name: str, ranks: int, *words: str, ends: Sequence[int] = (0,)) -> list[float]:
        """Train a run of this name, from nothing or on from where it stands, and read its losses."""
        launcher = ["-m", "accelerate.commands.launch", "--config_file", TWO_RANKS] if ranks == 2 else []
        script = self.root / "distill/run.py"
        self.start(*launcher, script, self.config, *self.words, f"name={name}", *words, ends=ends)
        return read_losses(self.folder / "runs" / name)


def make_material(ours: Checkout, other: Checkout, folder: Path) -> None:
    """Corpus, shards, teacher and student's LLM, made by the other checkout, and each one's caches, where they lack."""
    (folder / "config.yaml").write_text(CONFIG)
    if not (folder / "data").exists():
        other.do(make, f"runs={folder}/runs", "name=made", *MADE)
        for split in ("valid", "test"):  # nothing is validated: that is no step
            shutil.rmtree(folder / "data" / split)
    for one in (ours, other):
        if not (one.folder / "cache-frames").exists():
            one.do(fill_caches)
        shutil.rmtree(one.folder / "runs", ignore_errors=True)


def take_turns(checkouts: dict[str, Checkout], taken: dict, calls: dict) -> dict:
    """Add, by work and checkout, what each part took and the calls of one; by checkout the losses of its runs."""
    processes = {name: one.open(time_works) for name, one in checkouts.items()}
    told = {name: hear(process) for name, process in processes.items()}
    work, turn = "", 0
    while not all("losses" in said for said in told.values()):
        for name, said in told.items():
            work = said.get("begins", work)
            if "took" in said:
                taken.setdefault(work, {}).setdefault(name, []).append(said["took"])
            elif "calls" in said:
                calls.setdefault(work, {})[name] = said["calls"]
        turn += 1
        for name in sorted(processes, reverse=bool(turn % 2)):
            processes[name].stdin.write("\n")
            processes[name].stdin.flush()
            told[name] = hear(processes[name])
    for process in processes.values():
        process.communicate()
    return {name: said["losses"] for name, said in told.items()}


def hear(process: subprocess.Popen) -> dict:
    """What a process tells next.

    Raises:
        RuntimeError: it ended before; its last lines.
    """
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError("".join(lines[-8:]))


def find_ratios(taken: dict) -> dict:
    """By work and clock: seconds of a part in either checkout, and of the other's by ours median and quartiles."""
    figures = {}
    for work, by_name in taken.items():
        skipped, timed = 0 if work in WHOLE else WARM_UP, PARTS[work][1] - 1  # of a round
        parts = {name: [part for n, part in enumerate(of) if n % timed >= skipped] for name, of in by_name.items()}
        figures[work] = {}
        for number, clock in enumerate(("processor", "wall")):
            one = {name: [part[number] for part in of] for name, of in parts.items()}
            low, middle, high = quantiles([other / own for other, own in zip(one["other"], one["ours"])], n=4)
            seconds = {name: median(values) for name, values in one.items()}
            figures[work][clock] = {**seconds, "ratio": middle, "quartiles": [low, high]}
    return figures


def compare_ranks(ours: Checkout, other: Checkout) -> dict[str, str]:
    """By way to train on two ranks: whether both checkouts' losses are the same to the last bit."""
    found = {}
    for work in ("step", "step_frames", "step_online"):
        words = [f"train.steps={LOSS_STEPS}", *TRAINED[work]]
        losses = [one.train(f"{work}-2", 2, *words, *cache_in(one.words, words)) for one in (other, ours)]
        found[f"{PARTS[work][0]}, two ranks"] = describe_difference(*losses)
    return found


def describe_difference(others: Sequence[float], ours: Sequence[float]) -> str:
    """Whether two runs' losses are the same, in words."""
    if others == ours:
        return f"identical, {len(ours)} steps"
    largest = max(abs(a - b) / abs(a) for a, b in zip(others, ours))
    return f"differ by up to {largest:.1e} of the loss in {len(ours)} of {len(others)} steps"


def try_what_was_made(ours: Checkout, other: Checkout) -> dict[str, str]:
    """By what the other checkout made: how ours goes on with it, or the line that says why not."""
    steps = [f"train.steps={LOSS_STEPS}", *cache_in(other.words, [])]
    by_other = other.train("whole", 1, *steps)
    found = {"its cache": describe_difference(by_other, ours.train("its-cache", 1, *steps))}
    other.train("begun", 1, *steps, f"train.stop_after={LOSS_STEPS // 2}", ends=(0, STOPPED))
    shutil.copytree(other.folder / "runs/begun", ours.folder / "runs/begun")
    allowed: list[str] = []
    while "its checkpoint" not in found:
        words = [f"train.allow_change=[{','.join(allowed)}]"] if allowed else []
        try:
            how = describe_difference(by_other, ours.train("begun", 1, *steps, *words))
            found["its checkpoint"] = f"{how}; with {words[0]}" if words else how
        except RuntimeError as error:
            refusal = str(error).splitlines()[-1]
            found["its checkpoint, as it is"] = refusal.replace(str(ours.folder), "…")
            fields = set(re.findall(r"([\w.]+): nothing there", refusal)) - set(allowed)
            if not fields:
                break
            allowed += sorted(fields)
    return found


def make_table(figures: dict) -> str:
    """Markdown: ratios, then losses, then what was made before."""
    lines = [
        "| one | s before | s now | before ÷ now: processor | quartiles | wall | calls |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for work, clocks in figures["works"].items():
        own = clocks["processor"]
        (low, high), counted = own["quartiles"], figures["calls"][work]
        rest = f"{clocks['wall']['ratio']:.3f} | {counted['other'] / counted['ours']:.3f}"
        lines.append(f"| {PARTS[work][0]} | {own['other']:.4f} | {own['ours']:.4f} | **{own['ratio']:.3f}** "
                     f"| {low:.3f} to {high:.3f} | {rest} |")  # fmt: skip
    how = "Medians, part by part by turns; seconds are the processor's."
    lines += ["", how, "", "| losses | before and now |", "|---|---|"]
    lines += [f"| {way} | {how} |" for way, how in figures["losses"].items()]
    lines += ["", "| made before | read now |", "|---|---|"]
    lines += [f"| {what} | {how} |" for what, how in figures["made_before"].items()]
    return "\n".join(lines)


def commit_of(root: Path) -> str:
    """The commit that a checkout stands at, and whether files differ from it."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


def main() -> None:
    """Make the material, compare losses, time every work, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("other", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--folder", type=Path, help="of models, clips and caches, which are used again; default: none")
    parser.add_argument("--rounds", type=int, default=3, help="of fresh processes (%(default)s)")
    args = parser.parse_args()
    from record import write_result

    with tempfile.TemporaryDirectory() as name:
        material = (args.folder or Path(name)).resolve()
        ours, other = (Checkout(root.resolve(), material / who, material)
                       for who, root in (("ours", OURS), ("other", args.other)))  # fmt: skip
        make_material(ours, other, material)
        taken, calls = {}, {}
        for number in range(args.rounds):
            losses = take_turns({"other": other, "ours": ours}, taken, calls)
            print(f"round {number + 1}", json.dumps([find_ratios(taken), calls]), file=sys.stderr, flush=True)
        compared = {
            PARTS[work][0]: describe_difference(losses["other"][work], losses["ours"][work]) for work in TRAINED
        }
        figures = {"works": find_ratios(taken), "losses": compared, "made_before": {}, "taken": taken, "calls": calls,
                   "commits": {"other": commit_of(args.other), "ours": commit_of(OURS)}}  # fmt: skip
        write_result("against", figures, make_table(figures))  # and again with each of the next, which take minutes
        figures["losses"] |= compare_ranks(ours, other)
        write_result("against", figures, make_table(figures))
        figures["made_before"] = try_what_was_made(ours, other)
        write_result("against", figures, make_table(figures))


def do(name: str, config_path: str, words: Sequence[str]) -> int:
    """In a process of one checkout: call a function of this file as that checkout's commands call theirs."""
    from distill.cli import guard

    return guard(lambda: FUNCTIONS[name](config_path, words), debug=True)


FUNCTIONS = {function.__name__: function for function in (make, fill_caches, time_works)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--do"]:
        sys.exit(do(*sys.argv[2:4], sys.argv[4:]))
    main()
