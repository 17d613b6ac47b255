package scheduler

import (
	"context"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// deploymentRest is between looks at many deployments; deadlines are minutes.
const deploymentRest = time.Second

// watchDeployments fails the deployments that make no progress within their
// groups' progress deadline.
func (s *Scheduler) watchDeployments(ctx context.Context) error {
	return s.watchState(ctx, deploymentRest, func(snap *cluster.Snapshot, ws cluster.WatchSet) (next cluster.Time) {
		for _, d := range snap.ActiveDeployments(ws) {
			due := snap.ProgressDue(d)
			if due == 0 {
				continue
			}
			if t := now(); due <= t {
				due = t.Add(retryLater)
				s.failDeployment(ctx, d)
			}
			next = earliest(next, due)
		}
		return next
	})
}

// retryLater is when something that failed for no visible reason is looked at
// again, should the state not change before.
const retryLater = 30 * time.Second

// earliest is the sooner of two times, of which 0 means never.
func earliest(a, b cluster.Time) cluster.Time {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

func (s *Scheduler) failDeployment(ctx context.Context, d *cluster.Deployment) {
	res, err := s.apply(ctx, overdue(d, newID))
	log := s.log.With("deployment", d.ID, "job", d.JobID)
	switch {
	case err == nil:
		if res.Reverted != nil {
			log = log.With("reverted_to", *res.Reverted)
		}
		log.Info("deployment failed: no progress within its deadline", "eval", res.EvalID, "index", res.Index)
	case ctx.Err() == nil && cluster.CodeOf(err) != cluster.CodeConflict: // conflict: it ended just now
		log.Error("deployment is overdue but could not be failed", "error", err)
	}
}

// overdue fails a deployment that has made no progress.
func overdue(d *cluster.Deployment, newID func() string) *cluster.UpdateDeployment {
	return &cluster.UpdateDeployment{
		Update: &cluster.DeploymentStatusUpdate{
			DeploymentID: d.ID, Status: cluster.DeploymentFailed, StatusDescription: cluster.DeploymentDescProgressDeadline,
		},
		EvalID: newID(),
	}
}
