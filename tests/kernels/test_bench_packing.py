"""Micro-batches by real lengths, at recorded lengths."""

import json

import bench_packing


def test_documents_by_their_lengths_take_fewer_passes_and_no_more_room(tmp_path):
    """In a tree, which has no padding, as many token positions in fewer passes; in rows fewer of
    both, where several documents go together."""
    sizes = ["--documents", "16", "--document-tokens", "64", "--thought-tokens", "128"]
    assert bench_packing.main([*sizes, "--json", str(tmp_path / "packing.json")]) == 0
    for row in json.loads((tmp_path / "packing.json").read_text()):
        count, length = row["by_count"], row["by_length"]
        assert length["passes"] < count["passes"] and length["largest"] <= row["bound"]
        if row["layout"] == "tree":
            assert length["positions"] == count["positions"]
            assert length["passes"] <= count["passes"] / 3
        elif row["longest_documents"] > 1:
            assert length["positions"] < count["positions"]
