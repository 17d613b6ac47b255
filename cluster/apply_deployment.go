package cluster

func (t *tx) putDeployment(d, old *Deployment) {
	d.CreateIndex, d.ModifyIndex = t.index, t.index
	d.CreateTime, d.ModifyTime = t.stamp.Time, t.stamp.Time
	if old != nil {
		d.CreateIndex, d.CreateTime = old.CreateIndex, old.CreateTime
	}
	t.put(TableDeployments, d)
}

// setDeploymentStatus changes a deployment unless it has ended. One that succeeds makes its version stable, one that
// fails may take the job back to such a version, which it gives.
func (t *tx) setDeploymentStatus(u *DeploymentStatusUpdate) (reverted *uint64) {
	old := t.Deployment(nil, u.DeploymentID)
	if old == nil || !old.Active() {
		return nil
	}
	d := *old
	d.Status, d.StatusDescription = u.Status, u.StatusDescription
	if t.stamp.Rules >= rulesEngine {
		switch {
		case d.Status == DeploymentFailed:
			var outcome string
			reverted, outcome = t.autoRevert(old)
			d.StatusDescription += outcome
		case d.Status == DeploymentRunning && old.Status == DeploymentPaused:
			d.TaskGroups = t.restartProgress(old)
			d.StatusDescription = d.RunningDescription()
		}
	}
	t.putDeployment(&d, old)
	if d.Status == DeploymentSuccessful {
		if v := t.JobVersion(nil, d.JobKey(), d.JobVersion); v != nil {
			t.markStable(v, true)
		}
	}
	return reverted
}

// restartProgress gives the groups of a deployment that was paused the whole time to make progress again.
func (t *tx) restartProgress(d *Deployment) map[string]*DeploymentState {
	groups := Clone(d).TaskGroups
	for _, g := range groups { // each on its own
		if g.RequireProgressBy != 0 {
			g.startClock(t)
		}
	}
	return groups
}

// startClock begins the time within which an allocation must become healthy.
func (g *DeploymentState) startClock(t *tx) {
	if g.ProgressDeadline > 0 {
		g.RequireProgressBy = Time(t.stamp.Time).Add(g.ProgressDeadline)
	}
}

func (t *tx) updateDeployment(c *UpdateDeployment) (Result, *Error) {
	d := t.Deployment(nil, c.Update.DeploymentID)
	if d == nil {
		return Result{}, Errorf(CodeNotFound, "deployment not found")
	}
	if !d.Active() {
		return Result{}, Errorf(CodeConflict, "can't change terminal deployment: it is %s", d.Status)
	}
	res := Result{}
	if c.Update.Status != "" {
		res.Reverted = t.setDeploymentStatus(c.Update)
		t.autoPromote(d.ID) // what waited while it was paused
	}
	if refused := t.setHealth(d, c); refused != nil {
		return Result{}, refused
	}
	res.EvalID = t.evalDeployment(d, c.EvalID)
	return res, nil
}

// evalDeployment asks for an evaluation of the deployment's job, as it is now. It gives its ID, "" for none.
func (t *tx) evalDeployment(d *Deployment, id string) string {
	j := t.Job(nil, d.JobKey())
	if j == nil || id == "" {
		return ""
	}
	e := t.newEval(j, TriggerDeploymentWatcher, id)
	e.DeploymentID = d.ID
	t.putEvals([]*Evaluation{e})
	return id
}

// changeGroup updates the deployment state of an allocation's group, if the
// allocation belongs to an active deployment.
func (t *tx) changeGroup(a *Allocation, change func(*DeploymentState)) *Deployment {
	old := t.Deployment(nil, a.DeploymentID)
	if a.DeploymentID == "" || old == nil || !old.Active() || old.TaskGroups[a.TaskGroup] == nil {
		return nil
	}
	d := Clone(old)
	change(d.TaskGroups[a.TaskGroup])
	t.putDeployment(d, old)
	return d
}

// countPlaced adds a placement; the first one starts the progress clock.
func (t *tx) countPlaced(a *Allocation) {
	t.changeGroup(a, func(g *DeploymentState) {
		g.PlacedAllocs++
		if g.RequireProgressBy == 0 {
			g.startClock(t)
		}
		if a.Canary() {
			g.PlacedCanaries = append(g.PlacedCanaries, a.ID)
		}
	})
}

// upWell says whether an allocation lives and was found healthy.
func (a *Allocation) upWell() bool {
	s := a.DeploymentStatus
	return !a.Terminal() && s != nil && s.Healthy != nil && *s.Healthy
}

// uncountHealthy takes an allocation out of the healthy ones: it is over, leaves,
// or is well no more. What takes its place must become healthy before the deployment
// is done, or one of the old version would stay behind.
func (t *tx) uncountHealthy(a *Allocation) {
	t.changeGroup(a, func(g *DeploymentState) {
		g.HealthyAllocs = max(g.HealthyAllocs-1, 0)
		if g.Unpromoted() && g.RequireProgressBy != 0 { // the clock stood while it waited for its promotion
			g.startClock(t)
		}
	})
}

// countHealth adds an allocation's health. It says whether the job may need an
// evaluation: the deployment goes on, or has just failed.
func (t *tx) countHealth(a *Allocation, healthy bool) bool {
	if healthy && a.Terminal() {
		return false // it was, while it lived
	}
	d := t.changeGroup(a, func(g *DeploymentState) {
		if !healthy {
			g.UnhealthyAllocs++
			return
		}
		g.HealthyAllocs++
		g.startClock(t)
	})
	if d == nil {
		return false
	}
	if !healthy {
		if d.TaskGroups[a.TaskGroup].ProgressDeadline > 0 {
			// Replacements may still become healthy until the deadline. One that runs is
			// replaced by its reschedule policy; one that failed is evaluated anyway.
			return a.ClientStatus != AllocClientFailed
		}
		t.setDeploymentStatus(&DeploymentStatusUpdate{d.ID, DeploymentFailed, DeploymentDescFailedAllocs})
		return true
	}
	return !t.autoPromote(d.ID) && !t.succeed(d)
}

// succeed ends a deployment of which all allocations are healthy; false when it is not as far.
func (t *tx) succeed(d *Deployment) bool {
	for _, g := range d.TaskGroups {
		if g.HealthyAllocs < g.DesiredTotal || g.Unpromoted() {
			return false
		}
	}
	t.setDeploymentStatus(&DeploymentStatusUpdate{d.ID, DeploymentSuccessful, DeploymentDescSuccessful})
	return true
}

// unfinished says whether a deployment has more to place or to promote. One whose
// allocations are all there only waits for their health, which is no reason to plan.
func (t *tx) unfinished(d *Deployment) bool {
	if !d.Active() {
		return false
	}
	placed := map[string]int{}
	for _, a := range t.AllocsByDeployment(nil, d.ID) {
		if !a.Terminal() {
			placed[a.TaskGroup]++
		}
	}
	for name, g := range d.TaskGroups {
		if g.HealthyAllocs < g.DesiredTotal && placed[name] < g.DesiredTotal || g.Unpromoted() {
			return true
		}
	}
	return false
}
