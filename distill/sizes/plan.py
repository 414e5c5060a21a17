"""`distill plan CONFIG --gpus N`: what each stage holds on a card and what makes it fit; with `--card NAME` also the
hours and the disk that it takes.
"""

import argparse

from distill.sizes.cards import find_card
from distill.sizes.costs import Usage
from distill.sizes.fits import Cards, describe_needs, find_fit, format_needs, longest
from distill.sizes.hours import Stay, describe_hours, find_corpus, format_hours, plan_ways
from shards.status import print_json

GIGABYTES = 24.0  # of a card that is not named


def plan_cards(args: argparse.Namespace) -> int:
    """Print both; the exit code is 0 where everything fits as it is.

    Raises:
        ValueError: the card is unknown, or the training set's size.
    """
    card = None if args.card is None else find_card(args.card)
    gigabytes = args.gpu_gb or (GIGABYTES if card is None else card.gigabytes)
    cards = Cards(args.gpus, gigabytes, 0 if args.fsdp2 else args.zero, args.fsdp2)
    usage = longest(vars(args))
    fit = find_fit(args.config, cards, usage)
    found = {"stages": describe_needs(fit.needs, cards), "change": fit.words}
    texts = [format_needs(fit.needs, cards, usage), fit.advice]
    if card is not None:
        mean = Usage(**{name: value for name, value in vars(args).items() if name in Usage.__dataclass_fields__})
        corpus = find_corpus(args.config.shards("train"), args.audio_hours, mean)
        stay = Stay(card, args.gpus, args.reached)
        ways = plan_ways(args.config, stay, corpus, corpus.usage(mean))
        found["hours"] = describe_hours(ways, stay)
        texts.append(format_hours(ways, stay, corpus))
    if args.json:
        print_json(found)
    else:
        print("\n\n".join(filter(None, texts)))
    return 0 if fit.words == [] else 1
