package cluster

import (
	"fmt"
	"slices"
	"strings"
)

// promoteDeployment lets the canaries take the place of the old version: from now on they are allocations like
// others, and the rest follows at the pace of the update block.
func (t *tx) promoteDeployment(c *PromoteDeployment) (Result, *Error) {
	d := t.Deployment(nil, c.DeploymentID)
	switch {
	case d == nil:
		return Result{}, Errorf(CodeNotFound, "deployment not found")
	case !d.Active():
		return Result{}, Errorf(CodeConflict, "can't promote terminal deployment")
	}
	if j := t.Job(nil, d.JobKey()); j == nil || j.CreateIndex != d.JobCreateIndex || j.Version != d.JobVersion {
		return Result{}, Errorf(CodeConflict, "can't promote the deployment of version %d of job %q: it is not the job's current version any more", d.JobVersion, d.JobID)
	}
	var faults, groups []string
	for _, name := range c.Groups {
		if d.TaskGroups[name] == nil {
			faults = append(faults, fmt.Sprintf("the deployment has no task group %q", name))
		}
	}
	for _, name := range sortedKeys(d.TaskGroups) {
		g := d.TaskGroups[name]
		if !g.Unpromoted() || len(c.Groups) > 0 && !slices.Contains(c.Groups, name) {
			continue
		}
		if healthy := t.HealthyCanaries(d, name); healthy < g.DesiredCanaries {
			faults = append(faults, fmt.Sprintf("Task group %q has %d/%d healthy allocations", name, healthy, g.DesiredCanaries))
		}
		groups = append(groups, name)
	}
	switch {
	case faults != nil:
		return Result{}, Errorf(CodeConflict, "%s", strings.Join(faults, "\n"))
	case groups == nil:
		return Result{}, Errorf(CodeConflict, "no canaries to promote")
	}
	t.promote(d, groups)
	return Result{EvalID: t.evalDeployment(d, c.EvalID)}, nil
}

// autoPromote promotes a running deployment whose canaries are all healthy, if all of its groups that have canaries
// want that, with an evaluation of the job. It says whether it did.
func (t *tx) autoPromote(id string) bool {
	d := t.Deployment(nil, id)
	if t.stamp.Rules < rulesEngine || d == nil || d.Status != DeploymentRunning {
		return false
	}
	var groups []string
	for _, name := range sortedKeys(d.TaskGroups) {
		g := d.TaskGroups[name]
		switch {
		case g.DesiredCanaries == 0:
		case !g.AutoPromote:
			return false
		case !g.Promoted && t.HealthyCanaries(d, name) < g.DesiredCanaries:
			return false
		case !g.Promoted:
			groups = append(groups, name)
		}
	}
	if groups == nil {
		return false
	}
	t.promote(d, groups)
	t.evalDeployment(d, t.newID())
	return true
}

// promote marks groups of a deployment promoted. With canaries for all allocations it has succeeded.
func (t *tx) promote(old *Deployment, groups []string) {
	d := Clone(old)
	for _, name := range groups {
		g := d.TaskGroups[name]
		g.Promoted = true
		g.startClock(t)
		for _, id := range g.PlacedCanaries {
			if a := t.Alloc(nil, id); a != nil && a.Canary() && !a.Terminal() {
				n, status := *a, *a.DeploymentStatus
				status.Canary, status.ModifyIndex = false, t.index
				n.DeploymentStatus = &status
				t.putAlloc(&n, a, false)
			}
		}
	}
	if d.Status == DeploymentRunning {
		d.StatusDescription = d.RunningDescription()
	}
	t.putDeployment(d, old)
	t.succeed(d)
}

// autoRevert takes the job of a deployment that fails back to its newest stable version, if one of its groups wants
// that, and says in words for the deployment's description what came of it. A job that is at a stable version's
// specification already stays: so what fails again after it was taken back has failed for good.
func (t *tx) autoRevert(d *Deployment) (reverted *uint64, outcome string) {
	wanted := false
	for _, g := range d.TaskGroups {
		wanted = wanted || g.AutoRevert
	}
	j := t.Job(nil, d.JobKey())
	if !wanted || j == nil || j.Stop || j.CreateIndex != d.JobCreateIndex || j.Version != d.JobVersion {
		return nil, ""
	}
	versions := t.JobVersions(nil, j.Key()) // newest first
	i := slices.IndexFunc(versions, func(v *Job) bool {
		return v.Stable && v.Version < j.Version && v.CreateIndex == j.CreateIndex
	})
	if i < 0 {
		return nil, " - no stable job version to auto revert to"
	}
	stable := versions[i]
	back := Clone(stable)
	back.Stop = false
	if err := back.Detach(); err != nil {
		return nil, fmt.Sprintf(" - not rolling back to stable job version %d: %v", stable.Version, err)
	}
	if refused := t.pinModels(back); refused != nil {
		return nil, fmt.Sprintf(" - not rolling back to stable job version %d: %s", stable.Version, refused.Text)
	}
	if SpecEqual(back, j) {
		return nil, fmt.Sprintf(" - not rolling back to stable job version %d as current job has same specification", stable.Version)
	}
	source := t.Submission(nil, j.Key(), stable.Version)
	back = t.putJob(back, j)
	if source != nil {
		s := *source
		s.Version, s.JobModifyIndex = back.Version, back.JobModifyIndex
		t.put(TableSubmissions, &s)
	}
	was := stable.Version
	return &was, fmt.Sprintf(" - rolling back to job version %d", was)
}

// setHealth takes over what an operator says of the health of a deployment's allocations (Nomad: health_check =
// "manual").
func (t *tx) setHealth(d *Deployment, c *UpdateDeployment) *Error {
	var faults []string
	for _, id := range slices.Concat(c.Healthy, c.Unhealthy) {
		switch a := t.Alloc(nil, id); {
		case a == nil:
			faults = append(faults, fmt.Sprintf("unknown alloc %q", id))
		case a.DeploymentID != d.ID:
			faults = append(faults, fmt.Sprintf("alloc %q is not part of deployment %q", id, d.ID))
		case a.Terminal() && slices.Contains(c.Healthy, id):
			faults = append(faults, fmt.Sprintf("alloc %q has ended and cannot be healthy", id))
		}
	}
	if faults != nil {
		return Errorf(CodeInvalid, "%s", strings.Join(faults, "\n"))
	}
	for _, said := range []struct {
		ids     []string
		healthy bool
	}{{c.Healthy, true}, {c.Unhealthy, false}} {
		for _, id := range said.ids {
			old := t.Alloc(nil, id)
			a := *old
			healthy := said.healthy
			if mergeHealth(&a, &AllocDeploymentStatus{Healthy: &healthy}, t.index, Time(t.stamp.Time)) != nil {
				t.putAlloc(&a, old, false)
				t.countHealth(&a, healthy)
			}
		}
	}
	return nil
}
