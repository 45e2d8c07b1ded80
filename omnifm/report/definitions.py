"""What each number of a report means, in plain words."""

_METRICS = {
    "score": (
        "score over the tasks",
        "A client's main score, divided by the value that counts as full in its task; mean over the clients, weighted by their "
        "number of test images. Of one global model: mean over the tasks. Read the tasks' own scores.",
    ),
    "accuracy": ("accuracy", "Share of test images whose most probable class is the true one."),
    "auc": (
        "AUC",
        "Area under the ROC curve of one class against the rest, mean over the classes. A class that never occurs in the test "
        "set cannot be ranked and is left out; undefined where that leaves none.",
    ),
    "auc_classes_skipped": (
        "classes left out of the AUC",
        "How many classes the AUC leaves out because they never occur, or always do, in the test set. A count, not a score. "
        "Of own models: added up over the clients.",
    ),
    "f1_union": (
        "macro-F1 (all labels)",
        "F1 averaged over every label of all cohorts together, also those that a client does not have or that never occur in its "
        "test set (they count 0). It can stay low although almost every image is right.",
    ),
    "dice": ("Dice", "2|P∩G| / (|P|+|G|) per case and structure; both empty counts 1, one of them empty 0. Mean over the cases."),
    "hd95": (
        "HD95",
        "The larger of the two directed 95th percentiles of surface distances, in mm for volumes, in pixels of the network's "
        "grid. A missed structure counts the diagonal of the image. Less is better.",
    ),
    "missed": (
        "missed structures",
        "Structures that are in the truth or in the prediction alone. A count, not a score; of all clients together.",
    ),
    "empty_cases": (
        "empty structures",
        "Structures absent from truth and prediction alike. A count, not a score; of all clients together.",
    ),
    "capped": ("equal images", "Images whose PSNR was cut off at 100 dB. A count, not a score; of all clients together."),
    "undefined": ("undefined", "Pairs of which some score is undefined. A count, not a score; of all clients together."),
    "psnr": ("PSNR", "10 log10(255² / MSE) in dB on luminance rounded to 8 bits, a border as wide as the factor left out."),
    "ssim": ("SSIM", "Structural similarity, Gaussian window of 11 pixels; which images it compares is in the task's page."),
    "vif": ("VIF", "Visual information fidelity of the fused image against its two sources, mean over the two, on 0 to 255."),
    "closed_accuracy": ("accuracy, closed questions", "Closed questions whose normalised answer is exactly the true one."),
    "disjoint_accuracy": (
        "accuracy, unseen images",
        "Accuracy on questions whose image is in no training question, in cohorts that say so of each question; other cohorts "
        "are not in it, whatever their images.",
    ),
    "open_exact": ("exact match, open questions", "Open questions whose normalised answer is exactly the true one."),
    "open_recall": ("token recall, open questions", "Share of the true answer's words that are in the given one."),
    "f1_present": ("macro-F1 (labels present)", "F1 averaged over the labels that occur in the truth or in the predictions."),
}

VIEWS = {
    "personal": (
        "own models",
        "Each client's own model (the shared part and what it keeps to itself) on that client's own test images; the mean over "
        "clients, weighted by their number of test images (of closed questions, where the score is over those). Counts are "
        "added up.",
    ),
    "worst": (
        "worst client",
        "The worst of the clients' own-model scores: what the least served hospital gets. Counts have none.",
    ),
    "global": (
        "one global model",
        "The single shared model on all clients' test images together. Undefined for a method that has no such model.",
    ),
    "finetuned": (
        "after fine-tuning",
        "As own models, but each client first trains some more on its own data (`federation.finetune_epochs`, one epoch unless "
        "set). It shows what a few minutes of local training can make up for. Undefined where one client's fine-tuning failed: a "
        "mean over the others would be better for it.",
    ),
}

UNTRAINED = ("untrained rule", "A rule that needs no training, on the same test images: what any model has to beat.")

ROUNDS = (
    ("last round", "The score after the final round."),
    (
        "best on validation",
        "The score at the round whose own models did best on the validation images. The test images never choose the round.",
    ),
)

HETEROGENEITY = {
    "h_mod": ("modality skew", "0: every client has the same mix of modalities; 1: knowing the client tells you the modality."),
    "h_lab": (
        "label skew",
        "0: the clients see each class equally often; 1: no class in common. Undefined across label spaces.",
    ),
    "h_size": ("size skew", "Gini index of the clients' sizes. 0: all equally large; near 1: one client has nearly everything."),
    "h_ls": ("label-space difference", "0: all clients have the same set of labels; 1: no two clients share a label."),
}

TRAINING = (
    ("training loss", "Mean loss on the clients' training images in the round, weighted by their number of examples."),
    ("traffic", "Bytes of the tensors sent up to the server and down to the clients, counted where they are sent."),
)

BANK = (
    ("bank", "Vectors (prototypes) that clients uploaded: each is the mean of the frequency descriptions of many images."),
    (
        "retrieval share",
        "Of the bank vectors a client used: how many were its own, another client's of its modality, or of another.",
    ),
    (
        "effective rank",
        "How many directions the frequency descriptions really use. Near 0 or 1: they have become all alike (collapse).",
    ),
    (
        "two dimensions",
        "The two directions in which the bank's last vectors differ most (principal components). All rounds are drawn in them.",
    ),
)

COMPARISON = (
    ("mean ± sd", "Over the seeds; sd is the sample standard deviation, with n-1, and needs two seeds."),
    (
        "paired difference",
        "The reference minus the other method on the same seed, and so on the same partition and schedule; mean over the seeds.",
    ),
    (
        "95 % interval",
        "Of one difference by itself. Bootstrap: percentiles of the mean over resampled seeds, too narrow for few seeds. "
        "Student: assumes normal differences, wide for few seeds. Where many methods are compared, some interval leaves out 0 by "
        "chance.",
    ),
    (
        "t-test, Holm",
        "Paired t-test over the seeds, adjusted for the number of methods compared in the table at one participation. Below .05 "
        "the difference is coloured: believe that one. Where no method differs from the reference, one table in twenty has a "
        "coloured difference, so of many tables read one that you chose beforehand. With few seeds only large differences are "
        "found: no colour does not mean that two methods are equal. Without a test, and no part of the adjustment: the same "
        "difference on every seed, which with few seeds is often chance.",
    ),
    (
        "Wilcoxon, Holm",
        "Signed-rank test over all (participation, seed) pairs, adjusted for the number of methods compared. Pairs that share a "
        "seed are not quite independent, so p is on the low side. Below six pairs it cannot speak, and no p is given.",
    ),
)

_COUNTS = frozenset({"auc_classes_skipped", "missed", "empty_cases", "capped", "undefined"})

# Scores for which less is better; everything else is better when larger.
_LOWER_IS_BETTER = frozenset({"loss", "hd95", "asd", "rmse", "mae", "lpips", "ece"})


def metric_label(name: str) -> str:
    """Return the name of a metric as people write it; `task/metric` and `metric/class` keep both words."""
    *group, last = name.split("/")
    plain = _METRICS[last][0] if last in _METRICS else last.replace("_", " ")
    return ", ".join([*(metric_label(part) for part in group), plain])


def is_score(metric: str) -> bool:
    """Say whether more (or less) of a metric is better at all; a count is no score."""
    return not _COUNTS.intersection(metric.split("/"))


def lower_is_better(metric: str) -> bool:
    """Say whether a smaller score is the better one."""
    return bool(_LOWER_IS_BETTER.intersection(metric.split("/")))


def metric_terms(names: list[str]) -> tuple[tuple[str, str], ...]:
    """Return the definitions of those of the metrics that have one here."""
    parts = dict.fromkeys(part for name in names for part in name.split("/"))
    return tuple(_METRICS[part] for part in parts if part in _METRICS)
