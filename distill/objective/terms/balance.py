"""How unevenly a mixture's routers send tokens to its experts: what keeps some of them from doing all the work.

Of a layer: E times the sum over experts of the share of the tokens that go there and the mean of its probability, as
`load_balancing_loss_func` of transformers has it; k where all experts are alike, E where k do everything. Each layer by
itself, and their mean: transformers takes all layers' tokens together, where one layer's favor hides another's.

Shares are those of a micro-batch on its rank, as every trainer has them; so alone among the terms this one depends on
how a step was split. It is the mean over all positions of the step, prompt, audio and answer alike, each with the
shares of its own micro-batch. Gradients reach the probabilities; shares are counts and have none.

Shapes: P positions that hold something, E experts, K experts that a token goes to.
Source: Fedus et al., "Switch Transformers", 2021 (arXiv 2101.03961), equations 4 to 6.
"""

from typing import TYPE_CHECKING

from distill.objective.terms.term import Seen, SeenTerm

if TYPE_CHECKING:
    from torch import Tensor


class ExpertBalance(SeenTerm):
    """Of each position that holds something: the mean over the layers that have a router."""

    title = "Balance of experts"
    needs_routing = True
    depends_on_split = True

    def lacks_in(self, student) -> str | None:
        """Routers that transformers balances, and that are trained."""
        from teachers.experts import routers_of, trained_router_names

        if not routers_of(student.llm):
            return (
                f"loss.balance is above 0, but this student's LLM, a {type(student.llm).__name__}, has no routers that "
                f"could be balanced; set loss.balance=0, or make a mixture of it with `distill upcycle`."
            )
        if not trained_router_names(student.llm):
            return (
                "loss.balance is above 0, but this student's routers are frozen; add experts to student.lora_targets, "
                "which trains both, or set loss.balance=0."
            )
        return None

    def rows(self, m) -> "Tensor":
        """The batch row of each position that is no padding: row_P."""
        return m.batch.attention_mask_BT.nonzero()[:, 0]

    def values(self, seen: Seen) -> "Tensor":
        """What each position adds to the layers' imbalance: balance_P."""
        from torch import stack

        is_real = seen.batch.attention_mask_BT.flatten().bool()
        top_k = seen.student.llm.config.get_text_config().num_experts_per_tok
        return stack([imbalance(logits[is_real], top_k) for logits in seen.routing]).mean(0)


def imbalance(logits_PE: "Tensor", top_k: int) -> "Tensor":
    """What each position adds to a layer's imbalance: its probabilities, each times E and its expert's share."""
    probs_PE = logits_PE.float().softmax(-1)
    chosen_PK, num_experts = probs_PE.topk(top_k).indices, probs_PE.shape[1]
    share_E = chosen_PK.flatten().bincount(minlength=num_experts) / len(probs_PE)
    return num_experts * (probs_PE * share_E).sum(-1)
