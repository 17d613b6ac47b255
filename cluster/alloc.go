package cluster

import "time"

// Desired and client statuses of an allocation, as Nomad's API names them.
const (
	AllocDesiredRun   = "run"
	AllocDesiredStop  = "stop"
	AllocDesiredEvict = "evict"

	AllocClientPending  = "pending"
	AllocClientRunning  = "running"
	AllocClientComplete = "complete"
	AllocClientFailed   = "failed"
	AllocClientLost     = "lost"
	AllocClientUnknown  = "unknown"
)

// AllocUnknownDescription is the ClientDescription of an unknown allocation.
const AllocUnknownDescription = "alloc is unknown since its node is disconnected"

// Task states as Nomad's API names them.
const (
	TaskStatePending = "pending"
	TaskStateRunning = "running"
	TaskStateDead    = "dead"
)

// Allocation is one instance of a task group on a node. It names the version of
// its job and never embeds it.
type Allocation struct {
	ID                    string
	Namespace             string
	EvalID                string
	Name                  string // JOB.GROUP[INDEX]
	NodeID                string
	NodeName              string
	JobID                 string
	JobVersion            uint64
	JobCreateIndex        uint64
	TaskGroup             string
	AllocatedResources    *AllocatedResources
	Metrics               *AllocMetric
	DesiredStatus         string
	DesiredDescription    string
	DesiredTransition     DesiredTransition
	ClientStatus          string
	ClientDescription     string
	TaskStates            map[string]*TaskState
	DeploymentID          string
	DeploymentStatus      *AllocDeploymentStatus
	FollowupEvalID        string
	PreviousAllocation    string
	NextAllocation        string
	RescheduleTracker     *RescheduleTracker
	PreemptedAllocations  []string
	PreemptedByAllocation string
	// Checkpoints are by task: the newest that it has told of, or what it was started with.
	Checkpoints      map[string]*Checkpoint `json:",omitempty"`
	Serving          *Serving               // what an onnx task serves; address and readiness are the agent's
	UnknownSince     Time                   // when its node had been silent and ClientStatus became unknown; 0 otherwise
	Revision         uint64                 // of what its node said of it last, see Revision; 0: nothing yet, or without order
	Epoch            uint64                 // log index at which this start was decided; later epochs win
	CreateIndex      uint64
	ModifyIndex      uint64
	AllocModifyIndex uint64 // last change of the desired side
	CreateTime       int64  // unix nanoseconds
	ModifyTime       int64

	packedStates  string `stored:"PackedStates"` // of TaskStates; see Whole
	packedMetrics string `stored:"PackedMetrics"`
}

// JobKey is the key of the allocation's job.
func (a *Allocation) JobKey() JobKey { return JobKey{a.Namespace, a.JobID} }

// ClientTerminal says whether the node has finished with the allocation.
func (a *Allocation) ClientTerminal() bool {
	switch a.ClientStatus {
	case AllocClientComplete, AllocClientFailed, AllocClientLost:
		return true
	}
	return false
}

// ServerTerminal says whether the servers want it gone.
func (a *Allocation) ServerTerminal() bool {
	return a.DesiredStatus == AllocDesiredStop || a.DesiredStatus == AllocDesiredEvict
}

// Terminal says whether the allocation is over or asked to be: nothing new counts on it.
func (a *Allocation) Terminal() bool { return a.ServerTerminal() || a.ClientTerminal() }

// Occupies says whether the allocation still holds its node's resources: until
// the client has finished, whatever the servers want.
func (a *Allocation) Occupies() bool { return !a.ClientTerminal() }

// Serving is the model endpoint of an allocation: where gateways reach it.
type Serving struct {
	Task    string
	Model   string
	Version uint64
	Address string // host:port of the worker, "" until the agent says
	Ready   bool   // probed by the agent
}

// AllocatedResources is what an allocation was given.
type AllocatedResources struct {
	Tasks          map[string]*AllocatedTaskResources
	Shared         AllocatedSharedResources
	TaskLifecycles map[string]*TaskLifecycle `json:",omitempty"` // of the tasks that have one: not all run at one time
}

// AllocatedTaskResources is one task's share.
type AllocatedTaskResources struct {
	Cpu     AllocatedCPU
	Memory  AllocatedMemory
	Devices []*AllocatedDevice
}

// AllocatedCPU is in MHz.
type AllocatedCPU struct{ CpuShares int64 }

// AllocatedMemory is in MiB; MemoryMaxMB 0 means no more than MemoryMB.
type AllocatedMemory struct{ MemoryMB, MemoryMaxMB int64 }

// AllocatedDevice is a set of whole devices of one group of the node, or a share of one.
type AllocatedDevice struct {
	Vendor, Type, Name string
	DeviceIDs          []string
	Milli              int64 `json:",omitempty"` // thousandths of the one device, 0 for none or all
	MiB                int64 `json:",omitempty"` // of its memory
	MemoryMiB          int64 `json:",omitempty"` // that each of the devices has, 0 where that is not known
}

// Shared says whether this is a share of a device and not the whole.
func (d *AllocatedDevice) Shared() bool { return d.Milli > 0 || d.MiB > 0 }

// AllocatedSharedResources is shared by the group's tasks.
type AllocatedSharedResources struct {
	DiskMB   int64
	Networks []*NetworkResource
	Ports    []PortMapping
}

// PortMapping is an assigned port.
type PortMapping struct {
	Label  string
	Value  int
	To     int
	HostIP string
}

// DesiredTransition asks the scheduler to move, stop or replace an allocation.
type DesiredTransition struct {
	Migrate         *bool
	Reschedule      *bool
	ForceReschedule *bool
	NoShutdownDelay *bool
}

// AllocDeploymentStatus is an allocation's health within its deployment.
type AllocDeploymentStatus struct {
	Healthy     *bool
	Timestamp   Time
	Canary      bool // runs beside the old version until its deployment is promoted
	ModifyIndex uint64
}

// Canary says whether the allocation is a canary that has not been promoted.
func (a *Allocation) Canary() bool { return a.DeploymentStatus != nil && a.DeploymentStatus.Canary }

// RescheduleTracker remembers the replacements that led to this allocation.
type RescheduleTracker struct {
	Events         []*RescheduleEvent // at most MaxRescheduleEvents
	LastReschedule string
}

// MaxRescheduleEvents bounds RescheduleTracker.Events; the oldest leave first.
const MaxRescheduleEvents = 5

// RescheduleEvent is one replacement.
type RescheduleEvent struct {
	RescheduleTime int64 // unix nanoseconds
	PrevAllocID    string
	PrevNodeID     string
	Delay          time.Duration
}

// TaskState is what the node says of one task.
type TaskState struct {
	State       string
	Failed      bool
	Restarts    uint64
	LastRestart Time
	StartedAt   Time
	FinishedAt  Time
	Events      []*TaskEvent // at most MaxTaskEvents
}

// MaxTaskEvents bounds TaskState.Events; the oldest leave first.
const MaxTaskEvents = 10

// TaskEvent is one line of a task's history. Types are Nomad's: Received, Task
// Setup, Downloading Artifacts, Started, Terminated, Restarting, Not Restarting,
// Killing, Killed, Driver Failure, Failed Artifact Download, Failed Validation…
type TaskEvent struct {
	Type           string
	Time           int64 // unix nanoseconds
	DisplayMessage string
	Details        map[string]string
	Message        string
	FailsTask      bool
	ExitCode       int
	Signal         int
}

// AllocMetric says how a placement came about, or why it did not.
type AllocMetric struct {
	NodesEvaluated     int
	NodesFiltered      int
	NodesInPool        int
	NodePool           string
	NodesAvailable     map[string]int // by datacenter
	ClassFiltered      map[string]int
	ConstraintFiltered map[string]int
	NodesExhausted     int
	ClassExhausted     map[string]int
	DimensionExhausted map[string]int
	QuotaExhausted     []string
	ScoreMetaData      []*NodeScore
	AllocationTime     time.Duration
	CoalescedFailures  int
}

// NodeScore is one node's score in thousandths; the API shows it as a fraction.
type NodeScore struct {
	NodeID string
	Scores map[string]int64
	Norm   int64
}
