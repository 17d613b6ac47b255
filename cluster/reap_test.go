package cluster

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
)

// TestReapKeepsWhatIsNeeded: whatever a leader asks to forget, live records, current
// versions and nodes that hold something stay.
func TestReapKeepsWhatIsNeeded(t *testing.T) {
	h := newHarness(t)
	n, idle := testNode(h.id()), testNode(h.id())
	h.must(&RegisterNode{Node: n})
	h.must(&RegisterNode{Node: idle})
	a, _ := h.place(testJob("a", 1), n, nil)
	k := a.JobKey()
	for i := range 3 {
		j := testJob("a", 1)
		j.TaskGroups[0].Tasks[0].Config = json.RawMessage(fmt.Sprintf(`{"command":"%d"}`, i))
		h.must(&RegisterJob{Job: j, EvalID: h.id()})
	}
	h.must(&UpdateNodeStatus{Updates: []NodeStatusUpdate{{NodeID: n.ID, Status: NodeStatusDown}, {NodeID: idle.ID, Status: NodeStatusDown}}})
	all := &Reap{Jobs: []JobKey{k}, Allocs: []string{a.ID}, Nodes: []string{n.ID, idle.ID, "none"}}
	for v := range uint64(5) {
		all.Versions = append(all.Versions, JobVersionKey{k.Namespace, k.ID, v})
	}
	h.must(all)
	s := h.Snapshot()
	if s.Alloc(nil, a.ID) == nil || s.Job(nil, k) == nil || s.Node(nil, n.ID) == nil {
		t.Error("something live was forgotten")
	}
	if s.Node(nil, idle.ID) != nil {
		t.Error("a down node that holds nothing is kept")
	}
	var versions []uint64
	for _, v := range s.JobVersions(nil, k) {
		versions = append(versions, v.Version)
	}
	if !slices.Equal(versions, []uint64{3, 0}) { // the current one, and what runs
		t.Errorf("versions %v are kept", versions)
	}
}

// TestReapOfABigJobIsBounded: what does not leave with the job is still found,
// and leaves the versions behind it last.
func TestReapOfABigJobIsBounded(t *testing.T) {
	h := newHarness(t)
	j := testJob("big", 1)
	h.must(&RegisterJob{Job: j})
	evals := &UpdateEvals{}
	for range MaxReapedOfJob + 10 {
		evals.Evals = append(evals.Evals, &Evaluation{ID: h.id(), Namespace: "default", JobID: "big", Status: EvalStatusComplete})
	}
	h.must(evals)
	h.must(&DeregisterJob{Namespace: "default", JobID: "big"})
	h.must(&Reap{Jobs: []JobKey{j.Key()}})
	left := h.Snapshot().EvalsByJob(nil, j.Key())
	if len(left) != 10 || h.Snapshot().Job(nil, j.Key()) != nil {
		t.Fatalf("%d evaluations are left of the job", len(left))
	}
	k, ok := h.Snapshot().NextJobKey(JobKey{})
	if !ok || k != j.Key() {
		t.Fatalf("what is left is found under %v, %v", k, ok)
	}
	rest := &Reap{}
	for _, e := range left {
		rest.Evals = append(rest.Evals, e.ID)
	}
	h.must(rest)
	if k, ok := h.Snapshot().NextJobKey(JobKey{}); ok {
		t.Errorf("something is left of %v", k)
	}
}

func TestWalkByJob(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	var want []string
	for _, id := range []string{"a", "a/b", "a b", "aa", "b", "é", "\xf4\x8f\xbf\xbf"} {
		h.place(testJob(id, 1), n, nil)
		want = append(want, id)
	}
	h.must(&DeregisterJob{Namespace: "default", JobID: "aa", Purge: true}) // its allocation is left
	slices.Sort(want)
	var got []string
	for k, ok := h.Snapshot().NextJobKey(JobKey{}); ok; k, ok = h.Snapshot().NextJobKey(k) {
		got = append(got, k.ID)
	}
	if !slices.Equal(got, want) {
		t.Errorf("walked %q, want %q", got, want)
	}
}
