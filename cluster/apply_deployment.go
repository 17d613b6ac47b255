package cluster

func (t *tx) putDeployment(d, old *Deployment) {
	d.CreateIndex, d.ModifyIndex = t.index, t.index
	d.CreateTime, d.ModifyTime = t.stamp.Time, t.stamp.Time
	if old != nil {
		d.CreateIndex, d.CreateTime = old.CreateIndex, old.CreateTime
	}
	t.put(TableDeployments, d)
}

// setDeploymentStatus changes an active deployment; false when it has ended.
func (t *tx) setDeploymentStatus(u *DeploymentStatusUpdate) bool {
	old := t.Deployment(nil, u.DeploymentID)
	if old == nil || !old.Active() {
		return false
	}
	d := *old
	d.Status, d.StatusDescription = u.Status, u.StatusDescription
	t.putDeployment(&d, old)
	if d.Status == DeploymentSuccessful {
		if v := t.JobVersion(nil, d.JobKey(), d.JobVersion); v != nil {
			t.markStable(v, true)
		}
	}
	return true
}

func (t *tx) updateDeployment(c *UpdateDeployment) (Result, *Error) {
	d := t.Deployment(nil, c.Update.DeploymentID)
	if d == nil {
		return Result{}, Errorf(CodeNotFound, "deployment not found")
	}
	if !t.setDeploymentStatus(c.Update) {
		return Result{}, Errorf(CodeConflict, "can't change terminal deployment: it is %s", d.Status)
	}
	res := Result{}
	if j := t.Job(nil, d.JobKey()); j != nil && c.EvalID != "" {
		e := t.newEval(j, TriggerDeploymentWatcher, c.EvalID)
		e.DeploymentID = d.ID
		t.putEvals([]*Evaluation{e})
		res.EvalID = c.EvalID
	}
	return res, nil
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
		if g.RequireProgressBy == 0 && g.ProgressDeadline > 0 {
			g.RequireProgressBy = Time(t.stamp.Time).Add(g.ProgressDeadline)
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
	t.changeGroup(a, func(g *DeploymentState) { g.HealthyAllocs = max(g.HealthyAllocs-1, 0) })
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
		if g.ProgressDeadline > 0 {
			g.RequireProgressBy = Time(t.stamp.Time).Add(g.ProgressDeadline)
		}
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
	for _, g := range d.TaskGroups {
		if g.HealthyAllocs < g.DesiredTotal || (g.DesiredCanaries > 0 && !g.Promoted) {
			return true
		}
	}
	t.setDeploymentStatus(&DeploymentStatusUpdate{d.ID, DeploymentSuccessful, DeploymentDescSuccessful})
	return false
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
		if g.HealthyAllocs < g.DesiredTotal && placed[name] < g.DesiredTotal || g.DesiredCanaries > 0 && !g.Promoted {
			return true
		}
	}
	return false
}
