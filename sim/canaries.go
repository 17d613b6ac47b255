package sim

import (
	"fmt"

	"github.com/rxvision/rxvision/cluster"
)

// tryOut gives a group's updates canaries, automatic promotion and the way back.
func (u *user) tryOut(g *cluster.TaskGroup) {
	w := u.w
	if w.chance(400) {
		g.Update.Canary = w.oneOf(1, 1, 2, max(g.Count, 1))
		g.Update.AutoPromote = w.chance(400)
	}
	g.Update.AutoRevert = w.chance(400)
	if w.chance(100) {
		g.Update.ProgressDeadline = 0
	}
}

// ready says whether the canaries of a deployment could be promoted.
func ready(snap *cluster.Snapshot, d *cluster.Deployment) bool {
	waits := false
	for name, g := range d.TaskGroups {
		if g.Unpromoted() {
			if waits = true; snap.HealthyCanaries(d, name) < g.DesiredCanaries {
				return false
			}
		}
	}
	return waits
}

// promote promotes a deployment, most often one that can be.
func (u *user) promote(snap *cluster.Snapshot) cluster.Command {
	w, active := u.w, snap.ActiveDeployments(nil)
	if len(active) == 0 {
		return nil
	}
	d := pick(w, active)
	for _, other := range active {
		if ready(snap, other) && w.chance(700) {
			d = other
		}
	}
	cmd := &cluster.PromoteDeployment{DeploymentID: d.ID, EvalID: w.newID()}
	if w.chance(300) {
		cmd.Groups = []string{"group0"}
	}
	return cmd
}

// judge sets the health of a deployment's allocations by hand.
func (u *user) judge(snap *cluster.Snapshot) cluster.Command {
	w, active := u.w, snap.ActiveDeployments(nil)
	if len(active) == 0 {
		return nil
	}
	d := pick(w, active)
	allocs := snap.AllocsByDeployment(nil, d.ID)
	if len(allocs) == 0 {
		return nil
	}
	cmd := &cluster.UpdateDeployment{Update: &cluster.DeploymentStatusUpdate{DeploymentID: d.ID}, EvalID: w.newID()}
	if id := pick(w, allocs).ID; w.chance(600) {
		cmd.Healthy = []string{id}
	} else {
		cmd.Unhealthy = []string{id}
	}
	return cmd
}

// tag names a version of a job, or takes a name away.
func (u *user) tag(snap *cluster.Snapshot) cluster.Command {
	w, j := u.w, someJob(u, snap)
	if j == nil {
		return nil
	}
	cmd := &cluster.TagVersion{Namespace: j.Namespace, JobID: j.ID, Name: fmt.Sprintf("tag-%d", w.rnd.IntN(3)), Unset: w.chance(400)}
	if versions := snap.JobVersions(nil, j.Key()); w.chance(500) {
		cmd.Version = &pick(w, versions).Version
	}
	return cmd
}

// triedOut says whether canaries run only where a deployment under way wants them, and as many; nil: they do.
func triedOut(snap *cluster.Snapshot, j *cluster.Job) error {
	canaries, live := map[string]int{}, map[string]int{}
	for _, a := range snap.AllocsByJob(nil, j.Key()) {
		if a.Terminal() {
			continue
		}
		live[a.TaskGroup]++
		if !a.Canary() {
			continue
		}
		canaries[a.TaskGroup]++
		d := snap.Deployment(nil, a.DeploymentID)
		if d == nil || !d.Active() || d.JobVersion != j.Version {
			return fmt.Errorf("job %s has the canary %s of a deployment that has ended%s", j.ID, a.ID, story(snap, j.Key()))
		}
		if g := d.TaskGroups[a.TaskGroup]; !g.Unpromoted() || canaries[a.TaskGroup] > g.DesiredCanaries {
			return fmt.Errorf("job %s group %s has %d canaries, wanted: %d, promoted: %t%s", j.ID, a.TaskGroup, canaries[a.TaskGroup], g.DesiredCanaries, g.Promoted, story(snap, j.Key()))
		}
	}
	for _, g := range j.TaskGroups {
		if !j.PerNode() && live[g.Name] > g.Count+canaries[g.Name] {
			return fmt.Errorf("job %s group %s has %d allocations, of which %d are canaries, of %d%s", j.ID, g.Name, live[g.Name], canaries[g.Name], g.Count, story(snap, j.Key()))
		}
	}
	return nil
}
