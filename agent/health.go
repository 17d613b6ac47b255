package agent

import (
	"fmt"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Kinds of health_check: by what the services are checked by as well (the default), and one that leaves the verdict to an operator.
const (
	healthChecks = "checks"
	healthManual = "manual"
)

// Reasons of an unhealthy allocation as Nomad words them.
const (
	unhealthyFailed   = "Unhealthy because of failed task"
	unhealthyDeadline = "Task not running for min_healthy_time of %s by deadline"
	unhealthyChecks   = "Services not healthy by deadline"
	unhealthyModel    = "Model not ready for min_healthy_time of %s by deadline"
)

// watchHealth comes to a verdict on an allocation of a deployment: healthy once
// all tasks but those that run once around the others have run, its model has been ready, and the checks of its
// services have succeeded, for min_healthy_time;
// unhealthy when a task has failed, or at the healthy_deadline. It returns when to
// look again, 0 for not before a change.
func (r *runner) watchHealth(now time.Time) time.Duration {
	r.mu.Lock()
	g := r.group()
	if r.alloc.DeploymentID == "" || g == nil || g.Update == nil || g.Update.HealthCheck == healthManual || r.alloc.ServerTerminal() {
		r.mu.Unlock()
		return 0
	}
	l := r.local
	if l.Deployment != r.alloc.DeploymentID {
		l.Deployment, l.Healthy, l.WatchFrom = r.alloc.DeploymentID, nil, cluster.TimeOf(now)
		if ds := r.alloc.DeploymentStatus; ds != nil && ds.Healthy != nil {
			l.Healthy, l.HealthTime = ds.Healthy, ds.Timestamp
		}
	}
	if l.Healthy != nil {
		r.mu.Unlock()
		return 0
	}
	since, failed, waiting := r.healthySince(g)
	r.mu.Unlock()
	unchecked := ""
	if g.Update.HealthCheck == healthChecks {
		var passing time.Time
		if passing, unchecked = r.checksSince(); passing.After(since) {
			since = passing
		}
	}

	deadline := l.WatchFrom.Std().Add(g.Update.HealthyDeadline)
	switch {
	case failed != "":
		r.setHealth(now, false, unhealthyFailed, failed)
	case waiting == "" && unchecked == "" && now.Sub(since) >= g.Update.MinHealthyTime:
		r.setHealth(now, true, "", "")
	case !now.Before(deadline):
		text := unhealthyDeadline
		if r.modelLags(waiting) {
			text = unhealthyModel
		}
		text = fmt.Sprintf(text, g.Update.MinHealthyTime)
		if waiting == "" && unchecked != "" {
			text = unhealthyChecks
		}
		r.setHealth(now, false, text, waiting)
	case waiting == "" && unchecked == "":
		return min(since.Add(g.Update.MinHealthyTime).Sub(now), deadline.Sub(now))
	default:
		return deadline.Sub(now)
	}
	return 0
}

// healthySince says since when all is well, which task has failed, and which
// keeps it from being well. Caller holds mu.
func (r *runner) healthySince(g *cluster.TaskGroup) (since time.Time, failed, waiting string) {
	for _, t := range g.Tasks {
		l := r.local.Tasks[t.Name]
		switch {
		case l == nil:
			continue
		case l.State.State == cluster.TaskStateDead && l.State.Failed:
			return since, t.Name, ""
		case t.Lifecycle.Once(): // before or after what is to be healthy
			continue
		case l.State.State != cluster.TaskStateRunning:
			waiting = t.Name
		case t.Model != nil && (l.Serving == nil || !l.Serving.Ready):
			waiting = t.Name
		}
		if at := max(l.State.StartedAt, l.Ready).Std(); at.After(since) {
			since = at
		}
	}
	return since, "", waiting
}

// modelLags says whether a task runs whose model is not ready.
func (r *runner) modelLags(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.local.Tasks[name]
	return l != nil && l.Serving != nil && !l.Serving.Ready
}

// setHealth records the verdict; an unhealthy one is explained on the task.
func (r *runner) setHealth(now time.Time, healthy bool, text, taskName string) {
	r.log.Info("allocation health", "healthy", healthy, "reason", text)
	r.update(func() {
		r.local.Healthy, r.local.HealthTime = &healthy, cluster.TimeOf(now)
		for name, t := range r.local.Tasks {
			if !healthy && (taskName == "" || name == taskName) {
				addEvent(t.State, messageEvent(eventUnhealthy, text))
			}
		}
	})
}
