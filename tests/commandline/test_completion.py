"""Completion: what the last word of a command line may become, and the shell's own way to ask for it."""

import shutil
import subprocess
import sys
from functools import partial

import pytest

from distill.cli import build_command_parser, main
from distill.commandline.commands import COMMANDS
from distill.commandline.completion import SCRIPTS, complete

PARSERS = {name: partial(build_command_parser, name) for name in COMMANDS}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], ["transcribe"]),
        (["nothing", ""], []),
        (["export", "--me"], ["--merge"]),
        (["run", "salmonn_7b"], ["salmonn_7b_to_1b"]),
        (["run", "demo", "train.learning"], ["train.learning_rate="]),
        (["run", "demo", "student.connector="], ["student.connector=teacher", "student.connector=new"]),
        (["stats", "model", "fsdd", "student.ll"], ["student.llm="]),
        (["transcribe", "stud"], []),
    ],
)
def test_the_last_word_becomes_what_the_command_takes_there(words, found):
    assert complete(words, PARSERS) == found


def test_every_command_is_offered_to_an_empty_word():
    assert {"pipeline", "audit", "run", "export", "completion"} <= set(complete([""], PARSERS))


def test_bash_completes_a_field_through_the_script_that_is_printed(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    command = (
        f'distill() {{ {sys.executable} -m distill "$@"; }}\n{script}\nCOMP_WORDS=(distill run demo train.warm)\n'
        'COMP_CWORD=3\ncompopt() { :; }\n_distill\nprintf "%s" "${COMPREPLY[@]}"'
    )
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert process.stdout == "train.warmup_steps=", process.stderr


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_of_a_shell_that_is_here_is_one_that_it_reads(shell, tmp_path):
    (tmp_path / "script").write_text(SCRIPTS[shell])
    assert f"distill completion {shell} -- " in SCRIPTS[shell]
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_a_reader_that_has_had_enough_is_no_error():
    command = f"{sys.executable} -m distill completion bash -- '' | true; echo ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert process.stderr == "" and process.stdout.strip() in ("0", "141")
