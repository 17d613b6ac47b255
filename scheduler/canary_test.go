package scheduler

import (
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

func tryOut(canaries int, change ...func(*cluster.UpdateStrategy)) func(*cluster.Job) {
	return func(j *cluster.Job) {
		u := j.TaskGroups[0].Update
		u.Canary, u.MaxParallel = canaries, 2
		for _, c := range change {
			c(u)
		}
	}
}

// split gives a job's live allocations of a version that are canaries, and those that are none.
func split(snap *cluster.Snapshot, job string, version uint64) (canaries, others []*cluster.Allocation) {
	for _, a := range live(snap, job) {
		switch {
		case a.JobVersion != version:
		case a.Canary():
			canaries = append(canaries, a)
		default:
			others = append(others, a)
		}
	}
	return canaries, others
}

func (w *world) wantSplit(snap *cluster.Snapshot, version uint64, canaries, others int) {
	w.t.Helper()
	if c, o := split(snap, "web", version); len(c) != canaries || len(o) != others {
		w.t.Fatalf("of version %d there are %d canaries and %d others, want %d and %d", version, len(c), len(o), canaries, others)
	}
}

// TestCanariesOverNodeLoss: canaries wait for their promotion for as long as it takes; what is lost meanwhile comes
// back as what it was.
func TestCanariesOverNodeLoss(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.run(service("web", 3))
		w.agents()
		w.run(service("web", 3, command("v1"), tryOut(1)))
		snap := w.agents()
		w.wantSplit(snap, 0, 0, 3)
		w.wantSplit(snap, 1, 1, 0)
		time.Sleep(3 * time.Hour)
		d := w.settle().LatestDeployment(nil, key("web"))
		if d.Status != cluster.DeploymentRunning {
			t.Fatalf("a deployment that waits for its promotion is %s: %s", d.Status, d.StatusDescription)
		}
		canary, _ := split(w.settle(), "web", 1)
		w.status(canary[0].NodeID, cluster.NodeStatusDown)
		snap = w.agents()
		w.wantSplit(snap, 0, 0, 3)
		w.wantSplit(snap, 1, 1, 0)
		if d := snap.Deployment(nil, d.ID); d.Status != cluster.DeploymentRunning || d.TaskGroups["g"].HealthyAllocs != 1 {
			t.Fatalf("after the loss of the canary's node the deployment is %s, %+v", d.Status, d.TaskGroups["g"])
		}
		w.must(&cluster.PromoteDeployment{DeploymentID: d.ID, EvalID: newID()})
		snap = w.agents()
		w.wantSplit(snap, 0, 0, 0)
		w.wantSplit(snap, 1, 0, 3)
		if d := snap.Deployment(nil, d.ID); d.Status != cluster.DeploymentSuccessful {
			t.Fatalf("after its promotion the deployment is %s: %s", d.Status, d.StatusDescription)
		}
	})
}

// TestBlueGreen: as many canaries as allocations, promoted by themselves once all are healthy.
func TestBlueGreen(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 2))
		w.agents()
		w.run(service("web", 2, command("v1"), tryOut(2, func(u *cluster.UpdateStrategy) { u.AutoPromote = true })))
		w.wantLive(w.settle(), "web", 4)
		snap := w.agents()
		w.wantLive(snap, "web", 2)
		w.wantSplit(snap, 1, 0, 2)
	})
}

// TestCanariesThatFailGoBack: without progress the deployment fails, canaries end, and the job is what it was, once.
func TestCanariesThatFailGoBack(t *testing.T) {
	inWorld(t, func(w *world) {
		back := func(u *cluster.UpdateStrategy) { u.AutoRevert = true }
		w.node("n1", 0)
		w.run(service("web", 2, tryOut(1, back)))
		w.agents()
		old := map[string]bool{}
		for _, a := range w.wantLive(w.settle(), "web", 2) {
			old[a.ID] = true
		}
		w.run(service("web", 2, command("bad"), tryOut(1, back)))
		w.wantSplit(w.settle(), 1, 1, 0)
		time.Sleep(11 * time.Minute) // nobody says that the canary is healthy
		snap := w.agents()
		w.wantSplit(snap, 1, 0, 0)
		w.wantSplit(snap, 2, 0, 2)
		for _, a := range w.wantLive(snap, "web", 2) {
			if !old[a.ID] {
				t.Errorf("%s was started anew, though nothing of it has changed", a.Name)
			}
		}
		j := snap.Job(nil, key("web"))
		if j.Version != 2 || string(j.TaskGroups[0].Tasks[0].Config) != `{"command":"v0"}` {
			t.Errorf("the job is at version %d: %s", j.Version, j.TaskGroups[0].Tasks[0].Config)
		}
		d := snap.LatestDeployment(nil, j.Key())
		if d.JobVersion != 2 || d.TaskGroups["g"].DesiredCanaries != 0 {
			t.Fatalf("deployment of version %d: %+v", d.JobVersion, d.TaskGroups["g"])
		}
		time.Sleep(time.Hour)
		if j := w.agents().Job(nil, key("web")); j.Version != 2 {
			t.Errorf("the job is at version %d", j.Version)
		}
	})
}

// TestTaggedVersionsStay: a version with a tag is kept, however old.
func TestTaggedVersionsStay(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 1))
		w.agents()
		w.must(&cluster.SetJobStability{Namespace: "default", JobID: "web", Version: 0, Stable: false})
		w.must(&cluster.TagVersion{Namespace: "default", JobID: "web", Name: "gold"})
		for range 10 {
			w.run(service("web", 1, command(newID())))
			w.agents()
		}
		time.Sleep(6 * time.Minute)
		if v := w.settle().JobVersionByTag(nil, key("web"), "gold"); v == nil || v.Version != 0 {
			t.Fatalf("the tagged version is %+v", v)
		}
		w.must(&cluster.TagVersion{Namespace: "default", JobID: "web", Name: "gold", Unset: true})
		time.Sleep(6 * time.Minute)
		if v := w.settle().JobVersion(nil, key("web"), 0); v != nil {
			t.Error("a version that lost its tag is kept for ever")
		}
	})
}
