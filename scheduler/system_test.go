package scheduler

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// system makes a job one of those that run on every node; sysbatch one of those that do so once.
func system(j *cluster.Job) {
	j.Type = cluster.JobTypeSystem
	g := j.TaskGroups[0]
	g.Count, g.Update, g.Migrate, g.ReschedulePolicy = 1, nil, nil, nil
}

func sysbatch(j *cluster.Job) {
	system(j)
	j.Type = cluster.JobTypeSysBatch
}

// wantOn wants the job to be live on just these nodes, once on each.
func (w *world) wantOn(snap *cluster.Snapshot, job string, nodes ...string) {
	w.t.Helper()
	var on []string
	for _, a := range live(snap, job) {
		on = append(on, a.NodeID)
	}
	slices.Sort(on)
	if !slices.Equal(on, nodes) {
		w.t.Fatalf("job %s is on %v, want %v", job, on, nodes)
	}
}

func TestSystemJobFollowsNodes(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.run(service("mon", 1, system))
		w.wantOn(w.agents(), "mon", "n1", "n2")
		w.node("n3", 0)
		w.wantOn(w.agents(), "mon", "n1", "n2", "n3")

		w.status("n2", cluster.NodeStatusDown)
		snap := w.agents()
		w.wantOn(snap, "mon", "n1", "n3")
		if s := snap.Summary(nil, key("mon")).Summary["g"]; s.Lost != 1 || s.Queued != 0 {
			t.Errorf("with a node lost the summary is %+v", s)
		}
		if j := snap.Job(nil, key("mon")); j.Status != cluster.JobStatusRunning {
			t.Errorf("the job is %s", j.Status)
		}
		w.status("n2", cluster.NodeStatusReady)
		w.wantOn(w.agents(), "mon", "n1", "n2", "n3")

		w.must(&cluster.UpdateEligibility{NodeID: "n3", Eligibility: cluster.NodeIneligible})
		w.wantOn(w.agents(), "mon", "n1", "n2", "n3") // what runs, stays
		w.run(service("mon", 1, system, command("v1")))
		for _, a := range live(w.agents(), "mon") {
			if want := a.NodeID != "n3"; (a.JobVersion == 1) != want {
				t.Errorf("on %s runs version %d", a.NodeID, a.JobVersion)
			}
		}
		w.must(&cluster.UpdateEligibility{NodeID: "n3", Eligibility: cluster.NodeEligible})
		for _, a := range live(w.agents(), "mon") {
			if a.JobVersion != 1 {
				t.Errorf("on %s runs version %d", a.NodeID, a.JobVersion)
			}
		}

		w.must(&cluster.DeregisterNode{NodeID: "n1"})
		w.wantOn(w.agents(), "mon", "n2", "n3")
		w.must(&cluster.DeregisterJob{Namespace: "default", JobID: "mon", EvalID: newID()})
		snap = w.agents()
		w.wantOn(snap, "mon")
		if j := snap.Job(nil, key("mon")); j.Status != cluster.JobStatusDead {
			t.Errorf("the stopped job is %s", j.Status)
		}
	})
}

// TestSystemJobWaitsForRoom: a full node is a failure that is tried again, a filtered one is none.
func TestSystemJobWaitsForRoom(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 1)
		w.node("n2", 0)
		w.run(service("work", 1, gpus(1)))
		w.agents()
		e := w.run(service("gpumon", 1, system, gpus(1)))
		snap := w.settle()
		w.wantOn(snap, "gpumon")
		eval := w.wantEval(snap, e, cluster.EvalStatusComplete)
		w.wantEval(snap, eval.BlockedEval, cluster.EvalStatusBlocked)
		if f := eval.FailedTGAllocs["g"]; f == nil || f.NodesExhausted != 1 || f.NodesFiltered != 1 || eval.QueuedAllocations["g"] != 1 {
			t.Fatalf("the failure is %+v, queued %v", f, eval.QueuedAllocations)
		}
		w.node("n3", 1) // the blocked evaluation sees it
		snap = w.agents()
		w.wantOn(snap, "gpumon", "n3")
		w.must(&cluster.DeregisterJob{Namespace: "default", JobID: "work", EvalID: newID()})
		snap = w.agents()
		w.wantOn(snap, "gpumon", "n1", "n3")
		w.wantEval(snap, eval.BlockedEval, cluster.EvalStatusComplete)
	})
}

func TestSystemJobLeavesLast(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 1))
		w.run(service("mon", 1, system))
		w.run(service("once", 1, sysbatch))
		w.agents()
		w.must(&cluster.UpdateDrain{NodeID: "n1", Strategy: &cluster.DrainStrategy{Deadline: time.Hour}})
		w.wantOn(w.settle(), "mon", "n1") // web has nowhere to go, and stops first
		snap := w.agents()
		w.wantOn(snap, "web")
		w.wantOn(snap, "mon", "n1")
		if !snap.Node(nil, "n1").Drain {
			t.Fatal("the drain ended while sysbatch work runs")
		}
		w.say(live(snap, "once")[0], cluster.AllocClientComplete, true)
		snap = w.agents()
		w.wantOn(snap, "mon")
		n := snap.Node(nil, "n1")
		if n.Drain || n.LastDrain.Status != "complete" {
			t.Fatalf("after the drain the node is %+v", n)
		}
		w.must(&cluster.UpdateDrain{NodeID: "n1", MarkEligible: true})
		w.wantOn(w.agents(), "mon", "n1")

		w.must(&cluster.UpdateDrain{NodeID: "n1", Strategy: &cluster.DrainStrategy{Deadline: -1, IgnoreSystemJobs: true}})
		snap = w.agents()
		w.wantOn(snap, "web")
		w.wantOn(snap, "mon", "n1")
		if n := snap.Node(nil, "n1"); n.Drain {
			t.Fatal("a drain that ignores system jobs waits for them")
		}
	})
}

func TestSysBatchOnceOnEachNode(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("fix", 1, sysbatch))
		done := func(nodes ...string) *cluster.Snapshot {
			t.Helper()
			snap := w.agents()
			w.wantOn(snap, "fix", nodes...)
			for _, a := range live(snap, "fix") {
				w.say(a, cluster.AllocClientComplete, true)
			}
			snap = w.agents()
			w.wantOn(snap, "fix")
			if j := snap.Job(nil, key("fix")); j.Status != cluster.JobStatusDead {
				t.Errorf("all is done, and the job is %s", j.Status)
			}
			return snap
		}
		done("n1")
		w.node("n2", 0)
		w.node("n3", 0)
		done("n2", "n3")
		w.evaluate("fix")
		done()
		w.status("n1", cluster.NodeStatusDown)
		w.status("n1", cluster.NodeStatusReady)
		done()
		w.must(&cluster.DeregisterNode{NodeID: "n3"})
		done()
		w.run(service("fix", 1, sysbatch, command("v1")))
		done("n1", "n2")
	})
}

func TestSystemUpdateTakesItsTime(t *testing.T) {
	inWorld(t, func(w *world) {
		for i := range 5 {
			w.node(fmt.Sprintf("n%d", i), 0)
		}
		w.run(service("mon", 1, system))
		w.agents()
		w.run(service("mon", 1, system, command("v1"), func(j *cluster.Job) {
			j.TaskGroups[0].Update = &cluster.UpdateStrategy{MaxParallel: 2, Stagger: time.Minute}
		}))
		want := func(n int) {
			t.Helper()
			updated := 0
			for _, a := range w.wantLive(w.agents(), "mon", 5) {
				if a.JobVersion == 1 {
					updated++
				}
			}
			if updated != n {
				t.Fatalf("%d are updated, want %d", updated, n)
			}
		}
		want(2)
		w.evaluate("mon") // does not hurry it
		want(2)
		time.Sleep(59 * time.Second)
		want(2)
		time.Sleep(2 * time.Second)
		want(4)
		time.Sleep(61 * time.Second)
		want(5)
		if open := w.settle().OpenEvals(nil); len(open) > 0 {
			t.Fatalf("the update is over, and %+v is open", open[0])
		}
	})
}

// TestSystemJobFailsForGood: restarts are the node's; what has used them up is not placed
// again before somebody asks for it.
func TestSystemJobFailsForGood(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("mon", 1, system))
		w.say(w.wantLive(w.agents(), "mon", 1)[0], cluster.AllocClientFailed, false)
		w.evaluate("mon")
		w.wantOn(w.agents(), "mon")
		a := w.settle().AllocsByJob(nil, key("mon"))[0]
		w.must(&cluster.UpdateTransitions{Transitions: map[string]cluster.DesiredTransition{a.ID: {ForceReschedule: ptr(true)}}})
		w.evaluate("mon")
		snap := w.agents()
		w.wantOn(snap, "mon", "n1")
		w.must(&cluster.UpdateTransitions{Transitions: map[string]cluster.DesiredTransition{live(snap, "mon")[0].ID: {Migrate: ptr(true)}}})
		w.evaluate("mon")
		snap = w.agents()
		w.wantOn(snap, "mon", "n1")
		if next := live(snap, "mon")[0]; len(snap.AllocsByJob(nil, key("mon"))) != 3 || next.PreviousAllocation == "" {
			t.Fatalf("stopped by hand, it came back as %+v", next)
		}
	})
}

// TestSysBatchOfGoneNodesIsCollected: what was done on a node that is no more says nothing.
func TestSysBatchOfGoneNodesIsCollected(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.run(service("fix", 1, sysbatch))
		for _, a := range w.wantLive(w.agents(), "fix", 2) {
			if a.NodeID == "n1" {
				w.say(a, cluster.AllocClientComplete, true)
			}
		}
		w.must(&cluster.DeregisterNode{NodeID: "n1"})
		w.agents()
		time.Sleep(48 * time.Hour)
		snap := w.settle()
		if as := snap.AllocsByJob(nil, key("fix")); len(as) != 1 || as[0].NodeID != "n2" {
			t.Fatalf("%d allocations are left, of the first: %+v", len(as), as[0])
		}
	})
}
