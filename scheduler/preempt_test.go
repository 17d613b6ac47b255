package scheduler

import (
	"slices"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

func priority(n int) func(*cluster.Job) { return func(j *cluster.Job) { j.Priority = n } }

func gang(j *cluster.Job) { j.TaskGroups[0].Gang = &cluster.Gang{} }

// preempting lets jobs of both types preempt.
func (w *world) preempting() {
	w.must(&cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{
		SchedulerAlgorithm: "binpack", PreemptionConfig: cluster.PreemptionConfig{ServiceSchedulerEnabled: true, BatchSchedulerEnabled: true},
	}})
}

// TestPreemption: work of low priority makes room, is given time to save what it did, its place is
// nobody else's, whoever leads, and it comes back with its checkpoint.
func TestPreemption(t *testing.T) {
	inWorld(t, func(w *world) {
		w.preempting()
		w.node("n1", 2)
		w.run(service("train", 2, batch, gang, gpus(1), priority(20)))
		low := w.wantLive(w.agents(), "train", 2)
		w.say(low[0], cluster.AllocClientRunning, true)
		high := w.run(service("serve", 1, gpus(1), priority(70)))
		snap := w.settle()
		if e := w.wantEval(snap, high, cluster.EvalStatusComplete); len(e.FailedTGAllocs) > 0 || e.BlockedEval == "" || len(e.PlanAnnotations.PreemptedAllocs) != 2 {
			t.Fatalf("the evaluation of what preempts: %+v", e)
		}
		w.wantLive(snap, "train", 0)
		w.run(service("greedy", 1, gpus(1), priority(70))) // as high, and later
		w.run(service("other", 1, gpus(1), priority(50)))
		w.lead(false)
		w.lead(true)
		for _, a := range low { // one after the other
			snap = w.settle()
			a = snap.Alloc(nil, a.ID)
			if a.DesiredStatus != cluster.AllocDesiredEvict || a.PreemptedByAllocation == "" {
				t.Fatalf("preempted: %s, by %q", a.DesiredStatus, a.PreemptedByAllocation)
			}
			w.must(&cluster.UpdateAllocs{NodeID: a.NodeID, Allocs: []*cluster.Allocation{{
				ID: a.ID, Epoch: a.Epoch, ClientStatus: cluster.AllocClientFailed, Checkpoints: map[string]*cluster.Checkpoint{"t": {Step: 9, Path: "/c", Time: 1}},
			}}})
		}
		snap = w.settle()
		a := w.wantLive(snap, "serve", 1)[0]
		if len(a.PreemptedAllocations) == 0 || !slices.ContainsFunc(low, func(l *cluster.Allocation) bool { return snap.Alloc(nil, l.ID).PreemptedByAllocation == a.ID }) {
			t.Errorf("%s preempted %v", a.ID, a.PreemptedAllocations)
		}
		for _, job := range []string{"serve", "greedy"} {
			w.must(&cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: job, EvalID: newID()})
		}
		w.must(&cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: "other", EvalID: newID()})
		for _, a := range w.wantLive(w.agents(), "train", 2) {
			if c := a.Checkpoints["t"]; c == nil || c.Step != 9 || a.RescheduleTracker != nil {
				t.Errorf("it comes back with checkpoint %+v and reschedules %+v", c, a.RescheduleTracker)
			}
		}
	})
}

// TestGangStartsAnew: a member fails; the places of the others go to nobody else while they end.
func TestGangStartsAnew(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 3)
		w.run(service("train", 3, batch, gang, gpus(1)))
		members := w.wantLive(w.agents(), "train", 3)
		w.say(members[1], cluster.AllocClientFailed, false)
		time.Sleep(10 * time.Second) // its policy's delay
		w.wantLive(w.settle(), "train", 0)
		w.run(service("greedy", 1, gpus(1)))
		snap := w.settle()
		w.wantLive(snap, "greedy", 0)
		w.say(snap.Alloc(nil, members[0].ID), cluster.AllocClientComplete, true)
		snap = w.settle()
		w.wantLive(snap, "train", 0)
		w.say(snap.Alloc(nil, members[2].ID), cluster.AllocClientComplete, true)
		snap = w.agents()
		w.wantLive(snap, "train", 3)
		w.wantLive(snap, "greedy", 0)
	})
}
