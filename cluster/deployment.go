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

// DeploymentState is one group's progress.
type DeploymentState struct {
	AutoRevert        bool
	AutoPromote       bool
	Promoted          bool
	ProgressDeadline  time.Duration
	RequireProgressBy Time
	DesiredCanaries   int
	DesiredTotal      int
	PlacedCanaries    []string
	PlacedAllocs      int
	HealthyAllocs     int
	UnhealthyAllocs   int
}
