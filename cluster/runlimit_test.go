package cluster

import (
	"fmt"
	"testing"
	"time"
)

// TestEvalsShortOfRoom: those that wait for room come by priority and age, and only those. When one of them is cancelled
// while jobs declare how long they run, what it had reserved is there for others.
func TestEvalsShortOfRoom(t *testing.T) {
	h := newHarness(t)
	blocked := func(id string, priority int, change ...func(*Evaluation)) *Evaluation {
		e := &Evaluation{
			ID: id, Namespace: DefaultNamespace, JobID: "job-" + id, Type: JobTypeBatch, Priority: priority, Status: EvalStatusBlocked,
			TriggeredBy: TriggerQueuedAllocs, FailedTGAllocs: map[string]*AllocMetric{"g": {}},
		}
		for _, c := range change {
			c(e)
		}
		return e
	}
	for _, e := range []*Evaluation{
		blocked("low", 20), blocked("old", 50), blocked("quota", 50, func(e *Evaluation) { e.QuotaLimitReached = "q" }),
		blocked("young", 50), blocked("claims", 90, func(e *Evaluation) { e.Claims = []*Claim{{AllocID: "a"}} }), blocked("high", 100),
		blocked("replaces", 70, func(e *Evaluation) { e.FailedTGAllocs = nil }), blocked("pending", 60, func(e *Evaluation) { e.Status = EvalStatusPending }),
	} {
		h.must(&UpdateEvals{Evals: []*Evaluation{e}})
	}
	list := func(n int) (ids []string) {
		h.Snapshot().EvalsShortOfRoom(func(e *Evaluation) bool {
			ids = append(ids, e.ID)
			return len(ids) < n
		})
		return ids
	}
	if got, want := fmt.Sprint(list(9), list(2)), "[high old young low] [high old]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	cancel := func(id string) (woken bool) {
		before := h.Snapshot().Index(nil, IndexCapacity)
		e := *h.Snapshot().Eval(nil, id)
		e.Status = EvalStatusCanceled
		h.must(&UpdateEvals{Evals: []*Evaluation{&e}})
		return h.Snapshot().Index(nil, IndexCapacity) != before
	}
	if h.Snapshot().RunLimited() || cancel("old") {
		t.Error("no job declares anything, yet something is reserved")
	}
	j := testJob("limited", 1)
	j.TaskGroups[0].MaxRunDuration = time.Hour
	if j.NeedsRules() != rulesScaling {
		t.Errorf("it needs rules %d", j.NeedsRules())
	}
	h.must(&RegisterJob{Job: j, EvalID: "e"})
	if !h.Snapshot().RunLimited() || !cancel("high") || cancel("quota") {
		t.Error("who waits did not learn that a reservation has lapsed")
	}
}
