package cluster

import "time"

// Deployment statuses as Nomad's API names them.
const (
	DeploymentRunning    = "running"
	DeploymentPaused     = "paused"
	DeploymentFailed     = "failed"
	DeploymentSuccessful = "successful"
	DeploymentCancelled  = "cancelled"
)

// Descriptions of deployment statuses.
const (
	DeploymentDescRunning          = "Deployment is running"
	DeploymentDescSuccessful       = "Deployment completed successfully"
	DeploymentDescStoppedJob       = "Cancelled because job is stopped"
	DeploymentDescNewerJob         = "Cancelled due to newer version of job"
	DeploymentDescFailedAllocs     = "Failed due to unhealthy allocations"
	DeploymentDescProgressDeadline = "Failed due to progress deadline"
	DeploymentDescFailedByUser     = "Deployment marked as failed"
	DeploymentDescPaused           = "Deployment is paused"
	DeploymentDescNeedsPromotion   = "Deployment is running but requires manual promotion"
	DeploymentDescAutoPromotion    = "Deployment is running pending automatic promotion"
)

// Deployment is the roll-out of one job version.
type Deployment struct {
	ID                 string
	Namespace          string
	JobID              string
	JobVersion         uint64
	JobModifyIndex     uint64
	JobSpecModifyIndex uint64
	JobCreateIndex     uint64
	IsMultiregion      bool
	TaskGroups         map[string]*DeploymentState
	Status             string
	StatusDescription  string
	CreateIndex        uint64
	ModifyIndex        uint64
	CreateTime         int64
	ModifyTime         int64
}

// JobKey is the key of the deployment's job.
func (d *Deployment) JobKey() JobKey { return JobKey{d.Namespace, d.JobID} }

// Active says whether the deployment is still under way.
func (d *Deployment) Active() bool {
	return d.Status == DeploymentRunning || d.Status == DeploymentPaused
}

// Unpromoted says whether canaries of the group run, or are to, beside the old version. Where all of the group came
// without one, since nothing of an old version was left, nobody has anything to promote.
func (g *DeploymentState) Unpromoted() bool {
	return g != nil && g.DesiredCanaries > 0 && !g.Promoted && (len(g.PlacedCanaries) > 0 || g.HealthyAllocs < g.DesiredTotal)
}

// RunningDescription is the description of the deployment while it runs: it says what its canaries wait for.
func (d *Deployment) RunningDescription() string {
	description := DeploymentDescRunning
	for _, g := range d.TaskGroups { // order does not matter
		switch {
		case !g.Unpromoted():
		case !g.AutoPromote:
			return DeploymentDescNeedsPromotion
		default:
			description = DeploymentDescAutoPromotion
		}
	}
	return description
}

// HealthyCanaries counts the canaries of a deployment's group that live and were found healthy.
func (s *Snapshot) HealthyCanaries(d *Deployment, group string) (n int) {
	for _, id := range d.TaskGroups[group].PlacedCanaries {
		if a := first[Allocation](s.txn, nil, TableAllocs, "id", id); a != nil && a.upWell() {
			n++
		}
	}
	return n
}

// ProgressDue is when a deployment fails unless an allocation becomes healthy before; 0: it waits for none. A group
// whose canaries are well waits for its promotion, however long that takes.
func (s *Snapshot) ProgressDue(d *Deployment) (due Time) {
	if d.Status != DeploymentRunning {
		return 0
	}
	for name, g := range d.TaskGroups { // order does not matter
		switch {
		case g.HealthyAllocs >= g.DesiredTotal || g.RequireProgressBy == 0:
		case g.Unpromoted() && s.HealthyCanaries(d, name) >= g.DesiredCanaries:
		case due == 0 || g.RequireProgressBy < due:
			due = g.RequireProgressBy
		}
	}
	return due
}

// DeploymentState is one group's progress.
type DeploymentState struct {
	AutoRevert        bool
	AutoPromote       bool
	Promoted          bool
	ProgressDeadline  time.Duration
	RequireProgressBy Time
	DesiredCanaries   int
	DesiredTotal      int
	PlacedCanaries    []string // allocation IDs
	PlacedAllocs      int
	HealthyAllocs     int
	UnhealthyAllocs   int
}
