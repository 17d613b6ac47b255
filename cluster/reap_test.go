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

// TestLineageStays: the work that a model version names as its origin is verified, and
// stays with its job, version and evaluation whoever asks to forget it.
func TestLineageStays(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	a, _ := h.place(testJob("train", 1), n, nil)
	other, _ := h.place(testJob("other", 1), n, nil)
	k := a.JobKey()
	push := func(digest string, o *ModelOrigin) Result {
		return h.do(&CreateModelVersion{Version: &ModelVersion{Model: "m", Digest: "sha256:" + fmt.Sprintf("%064s", digest), Origin: o}})
	}
	for name, c := range map[string]struct {
		o    *ModelOrigin
		code Code
	}{
		"unknown job": {&ModelOrigin{JobID: "nope"}, CodeNotFound}, "unknown allocation": {&ModelOrigin{AllocID: "nope"}, CodeNotFound},
		"another's": {&ModelOrigin{JobID: "train", AllocID: other.ID}, CodeInvalid}, "elsewhere": {&ModelOrigin{Namespace: "x", AllocID: a.ID}, CodeInvalid},
	} {
		if res := push("1", c.o); CodeOf(res.Err) != c.code {
			t.Errorf("%s: %v, want %s", name, res.Err, c.code)
		}
	}
	if res := push("1", &ModelOrigin{AllocID: a.ID}); res.Err != nil {
		t.Fatal(res.Err)
	}
	want := ModelOrigin{"default", "train", 0, a.ID, a.EvalID}
	if got := h.Snapshot().ModelVersion(nil, "m", 1).Origin; got == nil || *got != want {
		t.Fatalf("origin %+v, want %+v", got, want)
	}
	for i := range 2 * MaxJobVersions {
		j := testJob("train", 1)
		j.TaskGroups[0].Tasks[0].Config = json.RawMessage(fmt.Sprintf(`{"command":"%d"}`, i))
		h.must(&RegisterJob{Job: j, EvalID: h.id()})
	}
	for _, x := range []*Allocation{a, other} {
		h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: x.ID, ClientStatus: AllocClientComplete}}})
	}
	if h.Snapshot().JobVersion(nil, k, 0) == nil {
		t.Error("a model's job version was overtaken")
	}
	h.must(&DeregisterJob{Namespace: "default", JobID: "train"})
	reap := func() {
		all := &Reap{Jobs: []JobKey{k}, Allocs: []string{a.ID, other.ID}, Versions: []JobVersionKey{{k.Namespace, k.ID, 0}}}
		for _, e := range append(h.Snapshot().EvalsByJob(nil, k), h.Snapshot().EvalsByJob(nil, other.JobKey())...) {
			all.Evals = append(all.Evals, e.ID)
			if !e.Terminal() {
				h.must(&UpdateEvals{Evals: []*Evaluation{answered(e)}})
			}
		}
		h.must(all)
	}
	for _, how := range []string{"collected", "purged"} {
		if how == "purged" {
			h.must(&DeregisterJob{Namespace: "default", JobID: "train", Purge: true})
		}
		reap()
		s := h.Snapshot()
		if s.Alloc(nil, a.ID) == nil || s.Eval(nil, a.EvalID) == nil || s.JobVersion(nil, k, 0) == nil || (s.Job(nil, k) == nil) != (how == "purged") {
			t.Errorf("%s: allocation %v, evaluation %v, version %v, job %v", how, s.Alloc(nil, a.ID), s.Eval(nil, a.EvalID), s.JobVersion(nil, k, 0), s.Job(nil, k))
		}
		if s.Alloc(nil, other.ID) != nil || s.Eval(nil, other.EvalID) != nil {
			t.Errorf("%s: what no model names stays", how)
		}
		if n := len(s.EvalsByJob(nil, k)); n != 1 && how == "collected" {
			t.Errorf("%d evaluations stay, want the one that placed the allocation", n)
		}
	}
}
