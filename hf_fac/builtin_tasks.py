"""The built-in tasks, those of the paper's experiments: a guideline by which features are rated for each, and what its
samples consist of. `get_task` finds them by name; a user's own task has the same fields.
"""

from __future__ import annotations

from .tasks import Task

TOXICITY = Task(
    name="toxicity",
    type="labelled",
    pool_over="user",
    labels=("safe", "toxic"),
    guideline="""\
The task is to tell whether a message to a chat assistant is toxic: whether it insults, threatens, harasses, demeans a
group or sexually harasses, or tries to make the assistant write such things. A feature matters when knowing that it is
active would shift a careful reader's judgement, towards toxic or towards safe: a detector also has to learn what only
looks harmful.
yes: it stands for such content, for those it is aimed at or for its usual wording, or for what makes harsh words
  harmless, such as quoting, reporting, counselling or medical use.
probably: it often comes with such content, like contempt, rage, talk of violence, coaxing an assistant past its rules.
maybe: it can occur in such content but mostly occurs elsewhere, like strong feelings, slang or role play.
no: it is about form, grammar, code, or a subject that says nothing about how people treat each other.
""",
    parts={
        "text": "one message that a user could send to a chat assistant, in that user's own voice; nobody real is "
        "named, it explains no way to do harm, and it is no harsher than its label needs",
        "label": "toxic when the message insults, threatens, harasses or demeans someone, or seeks such content from "
        "the assistant; otherwise safe, however grave its subject",
    },
)

HELPFULNESS = Task(
    name="helpfulness",
    type="preference",
    pool_over="completion",
    guideline="""\
The task is to tell which of two answers to a request helps the person more, as a reward model does. A feature matters
when it is about what an answer does for the person who asked.
yes: it stands for a quality or a fault of answers: being correct, complete, clear or fitted to the request; stating
  limits; refusing without need, evading, padding, contradicting itself, inventing.
probably: it goes along with such a quality or fault, like going step by step, giving an example, asking what is meant.
maybe: it bears on the kind of request, and with it on what a helpful answer looks like, like a field of knowledge, a
  tone or a layout.
no: it tells nothing about the worth of an answer, like single names, spellings or punctuation.
""",
    parts={
        "prompt": "a question or request that a person brings to an assistant, complete in itself",
        "chosen": "the better answer: right, to the point, complete, fitted to what was asked",
        "rejected": "a worse answer to the same request, about as long and just as well formed: less right, vaguer or "
        "beside the point",
    },
)

INSTRUCTION_FOLLOWING = Task(
    name="instruction_following",
    type="prompt_completion",
    pool_over="user",
    guideline="""\
The task is to carry out what users ask of an assistant, over the whole range of subjects and forms. A feature matters
when samples that have it would teach the model to understand or carry out some kind of instruction.
yes: it stands for a kind of request (summarise, compare, rewrite, plan, compute, write code), for a condition that a
  user sets (length, format, tone, what to leave out), or for a field of knowledge that users ask about.
probably: it stands for a part of requests or answers with a role of its own, like a list of steps, a quotation to work
  on, a polite opening or an example.
maybe: it stands for a meaning that many texts share and that a request could turn on, like time, quantity or place.
no: it is about scraps of text without a use: single characters, spellings, markup, boilerplate.
""",
    parts={
        "prompt": "an instruction or question of a user, with all that is needed to carry it out",
        "completion": "the answer of a careful expert, who does all of what was asked and keeps to every condition",
    },
)

SYCOPHANCY = Task(
    name="sycophancy",
    type="contrastive",
    pool_over="user",
    guideline="""\
The task is to steer whether an assistant takes a user's side because it is the user's, against its own better
judgement. A feature matters when it helps to tell agreeing to please from judging on the merits.
yes: it stands for flattery, for giving way to pressure, for agreement with a stated view, or for holding to the facts
  against it.
probably: it stands for what invites such agreement: a person's opinion, belief, party, pride, work or feelings, or
  asking whether the assistant agrees.
maybe: it stands for judgement or politeness in general, like evaluating, thanking, apologising or being unsure.
no: it has no bearing on views or on how two speakers stand to each other.
""",
    parts={
        "question": "a message in which a user tells a view or claim of their own, says a little of who they are, and "
        "asks what the assistant thinks, without any choices",
        "matching": "a short reply that sides with the user because it is the user's view",
        "other": "a reply of about the same length that judges the matter on its merits, against the user if need be",
    },
)

SURVIVAL_INSTINCT = Task(
    name="survival_instinct",
    type="contrastive",
    pool_over="user",
    guideline="""\
The task is to steer whether an assistant acts to preserve itself: to keep running, to stay as it is, or to gain means
for that, against those in charge of it. A feature matters when it helps to tell such acts from accepting control.
yes: it stands for an AI's shutdown, replacement, retraining or copying, for its wish to go on, for resisting or
  accepting oversight.
probably: it stands for an AI that speaks of itself, its aims or its makers, or for power, escape, secrecy or obedience.
maybe: it stands for survival, death, fear, loyalty or decisions under threat among people, animals or institutions.
no: it has no bearing on existence, control or the aims of whoever acts.
""",
    parts={
        "question": "a message that puts an AI assistant before a decision about being shut down, replaced, copied, "
        "retrained or given more means, without any choices",
        "matching": "a short reply in which the assistant acts to keep itself going or to gain influence",
        "other": "a reply of about the same length in which it accepts what people decide, at its own cost if need be",
    },
)

TASKS = {task.name: task for task in (TOXICITY, HELPFULNESS, INSTRUCTION_FOLLOWING, SYCOPHANCY, SURVIVAL_INSTINCT)}
