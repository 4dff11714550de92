"The charts of an interrupted file say how much of it was measured."

from llmopt.evaluation.results import Query, Results
from llmopt.visualization import View


def test_an_interrupted_file_says_so():
    "In place of queries and rounds, which were not all measured."
    queries = [Query(id="q0", text="?"), Query(id="q1", text="?")]
    stopped = Results(queries=queries, warnings=["interrupted: 9 of 71 measurements; go on with --resume"])
    assert View(stopped).extent().startswith("interrupted: 9 of 71 measurements")
    assert View(Results(queries=queries)).extent().startswith("2 queries")
