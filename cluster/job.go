package cluster

import (
	"encoding/json"
	"slices"
	"strings"
	"time"
)

// Job types (Nomad: job specification, type).
const (
	JobTypeService  = "service"
	JobTypeBatch    = "batch"
	JobTypeSystem   = "system"
	JobTypeSysBatch = "sysbatch"
)

// Job statuses as Nomad's API names them.
const (
	JobStatusPending = "pending"
	JobStatusRunning = "running"
	JobStatusDead    = "dead"
)

// DefaultNamespace and DefaultNodePool are used where a job names none.
// NodePoolAll is the built-in pool that every node belongs to.
const (
	DefaultNamespace = "default"
	DefaultNodePool  = "default"
	NodePoolAll      = "all"
)

// DefaultPriority is the priority of a job that names none (1 to 100, higher first).
const DefaultPriority = 50

// Job is one version of a unit of work, complete with its defaults: package
// jobspec makes it from what a user submits. Its JSON has the field names of
// Nomad's API.
type Job struct {
	Region      string
	Namespace   string
	ID          string
	Name        string
	Type        string
	Priority    int
	AllAtOnce   bool
	Datacenters []string // globs
	NodePool    string
	Constraints []*Constraint
	TaskGroups  []*TaskGroup
	Meta        map[string]string
	// Affinities and Spreads hold for every group besides its own.
	Affinities []*Affinity `json:",omitempty"`
	Spreads    []*Spread   `json:",omitempty"`
	// What makes a job run through others, and what such another has of it: see child.go.
	Periodic                 *PeriodicConfig         `json:",omitempty"`
	ParameterizedJob         *ParameterizedJobConfig `json:",omitempty"`
	ParentID                 string                  `json:",omitempty"` // of a child: the job that it was dispatched or launched from
	Dispatched               bool                    `json:",omitempty"` // a child of a parameterized job, or a child of that one
	DispatchIdempotencyToken string                  `json:",omitempty"`
	Payload                  []byte                  `json:",omitempty"` // of the dispatch; at most MaxPayload bytes
	VersionTag               *JobVersionTag          `json:",omitempty"` // set by TagVersion

	// Set by the state.
	Stop              bool
	Status            string
	StatusDescription string
	Stable            bool
	Version           uint64
	SubmitTime        int64  // unix nanoseconds
	CreateIndex       uint64 // log index of the first registration
	ModifyIndex       uint64 // … of the last change, status included
	JobModifyIndex    uint64 // … of the last change of the specification
}

// Group returns the task group of that name, or nil.
func (j *Job) Group(name string) *TaskGroup {
	for _, g := range j.TaskGroups {
		if g.Name == name {
			return g
		}
	}
	return nil
}

// prefers says whether the job has affinities or spreads.
func (j *Job) prefers() bool {
	affinities, spreads := j.preferences()
	return slices.ContainsFunc(affinities, func(l *[]*Affinity) bool { return len(*l) > 0 }) ||
		slices.ContainsFunc(spreads, func(l *[]*Spread) bool { return len(*l) > 0 })
}

// forgetPreferences takes all affinities and spreads out of the job.
func (j *Job) forgetPreferences() {
	affinities, spreads := j.preferences()
	for _, l := range affinities {
		*l = nil
	}
	for _, l := range spreads {
		*l = nil
	}
}

// preferences are the lists of affinities and spreads of the job and of what is in it.
func (j *Job) preferences() (affinities []*[]*Affinity, spreads []*[]*Spread) {
	affinities, spreads = append(affinities, &j.Affinities), append(spreads, &j.Spreads)
	for _, g := range j.TaskGroups {
		affinities, spreads = append(affinities, &g.Affinities), append(spreads, &g.Spreads)
		for _, t := range g.Tasks {
			affinities = append(affinities, &t.Affinities)
			if t.Resources == nil {
				continue
			}
			for _, d := range t.Resources.Devices {
				affinities = append(affinities, &d.Affinities)
			}
		}
	}
	return affinities, spreads
}

// Key is the primary key of a job.
func (j *Job) Key() JobKey { return JobKey{j.Namespace, j.ID} }

// JobKey names a job within a region.
type JobKey struct{ Namespace, ID string }

// Constraint narrows the nodes or devices that work may use (Nomad: constraint block).
type Constraint struct {
	LTarget string
	RTarget string
	Operand string
}

// String renders the constraint as Nomad's placement failures do: `${attr.kernel.name} = linux`.
func (c *Constraint) String() string {
	return c.LTarget + " " + c.Operand + " " + c.RTarget
}

// Affinity prefers some nodes, or devices, to others: those that satisfy it (Nomad:
// affinity block, https://developer.hashicorp.com/nomad/docs/job-specification/affinity).
type Affinity struct {
	LTarget string
	RTarget string
	Operand string
	Weight  int // -100 to 100, not 0: what it counts beside other affinities; below 0 it keeps away
}

// Spread wants the allocations of a group spread over the values that nodes have for
// an attribute (Nomad: spread block, https://developer.hashicorp.com/nomad/docs/job-specification/spread).
type Spread struct {
	Attribute    string
	Weight       int             // 0 to 100: what it counts beside other spreads
	SpreadTarget []*SpreadTarget // none: evenly
}

// SpreadTarget is the share of the allocations that one value is to have. What the
// targets of a spread leave of 100 is shared evenly by all other values.
type SpreadTarget struct {
	Value   string
	Percent int
}

// TaskGroup is a set of tasks placed together on one node, Count times.
type TaskGroup struct {
	Name             string
	Count            int
	Constraints      []*Constraint
	Tasks            []*Task
	RestartPolicy    *RestartPolicy
	ReschedulePolicy *ReschedulePolicy
	EphemeralDisk    *EphemeralDisk
	Update           *UpdateStrategy // nil for batch; of system jobs only MaxParallel and Stagger count, nil: all at once
	Migrate          *MigrateStrategy
	Networks         []*NetworkResource
	Meta             map[string]string
	ShutdownDelay    *time.Duration
	Disconnect       *DisconnectStrategy // nil: what runs on a lost node is lost at once
	Affinities       []*Affinity         `json:",omitempty"`
	Spreads          []*Spread           `json:",omitempty"`
	Gang             *Gang               `json:",omitempty"` // nil: the allocations are placed one by one
	Preempt          *PreemptPolicy      `json:",omitempty"` // nil: like the zero value
	Scaling          *ScalingPolicy      `json:",omitempty"` // nil: any count, set by hand
	Services         []*Service          `json:",omitempty"` // besides those of its tasks
	MaxRunDuration   time.Duration       `json:",omitempty"` // after it an allocation is ended, see RunBegan; 0: never
}

// Task returns the task of that name, or nil.
func (g *TaskGroup) Task(name string) *Task {
	for _, t := range g.Tasks {
		if t.Name == name {
			return t
		}
	}
	return nil
}

// Task is one process (tree) of a task group.
type Task struct {
	Name          string
	Driver        string
	User          string
	Config        json.RawMessage // the driver's own block as canonical JSON (sorted keys)
	Env           map[string]string
	Constraints   []*Constraint
	Resources     *Resources
	RestartPolicy *RestartPolicy
	Meta          map[string]string
	KillTimeout   time.Duration
	KillSignal    string
	LogConfig     *LogConfig
	Artifacts     []*Artifact
	Templates     []*Template
	Leader        bool
	ShutdownDelay time.Duration
	// Model is the model that an onnx task serves; nil for other drivers.
	Model *ModelRef `json:",omitempty"`
	// Affinities count for the whole group.
	Affinities []*Affinity `json:",omitempty"`
	// DispatchPayload names the file that a dispatched job's payload is written to; nil: none.
	DispatchPayload *DispatchPayloadConfig `json:",omitempty"`
	Lifecycle       *TaskLifecycle         `json:",omitempty"` // nil: one of the main tasks
	Services        []*Service             `json:",omitempty"`
}

// ModelRef says which model an onnx task serves. A job names it as NAME (the
// newest version), NAME@ALIAS or NAME:VERSION in the task's `config { model }`;
// Reference keeps that text. The state resolves it when the job is registered and
// pins Version and Digest on the job version; an allocation never follows an
// alias live.
type ModelRef struct {
	Reference string
	Name      string
	Alias     string
	Version   uint64
	Digest    string // sha256:<hex> of the artifact
	Size      int64  // bytes of the artifact
}

// RestartPolicy says how often a task is restarted in place (Nomad: restart block).
type RestartPolicy struct {
	Attempts        int
	Interval        time.Duration
	Delay           time.Duration
	Mode            string // fail or delay
	RenderTemplates bool
}

// ReschedulePolicy says when a failed allocation is replaced (Nomad: reschedule block).
type ReschedulePolicy struct {
	Attempts      int
	Interval      time.Duration
	Delay         time.Duration
	DelayFunction string // constant, exponential or fibonacci
	MaxDelay      time.Duration
	Unlimited     bool
}

// Values of DisconnectStrategy.Reconcile as Nomad's API names them.
const (
	ReconcileBestScore       = "best_score"
	ReconcileLongestRunning  = "longest_running"
	ReconcileKeepOriginal    = "keep_original"
	ReconcileKeepReplacement = "keep_replacement"
)

// DisconnectStrategy says what becomes of allocations whose node the servers do
// not hear any more (Nomad: disconnect block,
// https://developer.hashicorp.com/nomad/docs/job-specification/disconnect).
type DisconnectStrategy struct {
	LostAfter time.Duration // how long they are unknown before they are lost; 0: for ever, since Replace is false then
	Replace   bool          // whether others run in their place while they are unknown
	Reconcile string        // which of the two goes on when the node returns
}

// EphemeralDisk is the task directories' size in MiB (Nomad: ephemeral_disk block).
type EphemeralDisk struct {
	Sticky  bool
	Migrate bool
	SizeMB  int
}

// UpdateStrategy says how a new version replaces the old one (Nomad: update block).
type UpdateStrategy struct {
	Stagger          time.Duration
	MaxParallel      int
	HealthCheck      string // checks, task_states or manual
	MinHealthyTime   time.Duration
	HealthyDeadline  time.Duration
	ProgressDeadline time.Duration
	Canary           int
	AutoRevert       bool
	AutoPromote      bool
}

// MigrateStrategy bounds how a drain moves allocations (Nomad: migrate block).
type MigrateStrategy struct {
	MaxParallel     int
	HealthCheck     string
	MinHealthyTime  time.Duration
	HealthyDeadline time.Duration
}

// Resources is what a task asks for.
type Resources struct {
	CPU         int // MHz
	Cores       int
	MemoryMB    int
	MemoryMaxMB int
	DiskMB      int
	Devices     []*RequestedDevice
}

// RequestedDevice asks for Count devices named TYPE, VENDOR/TYPE or
// VENDOR/TYPE/NAME (Nomad: device block), or, where TYPE ends in -milli or -mib, for
// Count thousandths or MiB of one of them.
type RequestedDevice struct {
	Name        string
	Count       uint64
	Constraints []*Constraint
	Affinities  []*Affinity `json:",omitempty"`
}

// Endings of a device's type that ask for a share of one device.
const (
	milliSuffix = "-milli"
	mibSuffix   = "-mib"
)

// Share says what device is meant by a request for a part of one, and how many
// thousandths or MiB of it; both are 0 where whole devices are asked for.
func (d *RequestedDevice) Share() (device string, milli, mib int64) {
	parts := strings.SplitN(d.Name, "/", 3)
	kind := &parts[min(1, len(parts)-1)]
	if base, ok := strings.CutSuffix(*kind, milliSuffix); ok {
		*kind, milli = base, int64(d.Count)
	} else if base, ok := strings.CutSuffix(*kind, mibSuffix); ok {
		*kind, mib = base, int64(d.Count)
	}
	return strings.Join(parts, "/"), milli, mib
}

// NeedsRules is the version of the rules by which such a job can be registered, see
// Snapshot.Rules: servers that do not know it would lose a part of what it asks for.
func (j *Job) NeedsRules() uint64 {
	switch {
	case slices.ContainsFunc(j.TaskGroups, func(g *TaskGroup) bool { return g != nil && g.Preempt != nil && g.Preempt.Move }):
		return rulesMoves
	case j.hasServices(), j.scales(), slices.ContainsFunc(j.TaskGroups, (*TaskGroup).limited):
		return rulesScaling
	case slices.ContainsFunc(j.TaskGroups, (*TaskGroup).needsEngine), j.PerNode(), j.hasLifecycles(), j.Namespace != "" && j.Namespace != DefaultNamespace:
		return rulesEngine
	case j.needsChildren():
		return rulesChildren
	case j.asksShares():
		return rulesShares
	case j.prefers():
		return rulesPreferences
	}
	return 0
}

// needsEngine says whether the group has what only rulesEngine knows.
func (g *TaskGroup) needsEngine() bool {
	if g == nil {
		return false
	}
	u := g.Update
	return g.Gang != nil || g.Preempt != nil || g.Scaling != nil || u != nil && (u.Canary > 0 || u.AutoRevert || u.AutoPromote)
}

// asksShares says whether the job asks for a part of a device.
func (j *Job) asksShares() bool {
	return slices.ContainsFunc(j.TaskGroups, func(g *TaskGroup) bool {
		return g != nil && slices.ContainsFunc(g.Tasks, func(t *Task) bool {
			return t != nil && t.Resources != nil && slices.ContainsFunc(t.Resources.Devices, func(d *RequestedDevice) bool {
				_, milli, mib := d.Share()
				return milli > 0 || mib > 0
			})
		})
	})
}

// NetworkResource is a group's network block, or one network of a node or an
// allocation. Mode "host" is the only one; ports without Value are dynamic.
type NetworkResource struct {
	Mode          string
	Device        string `json:",omitempty"`
	CIDR          string `json:",omitempty"`
	IP            string `json:",omitempty"`
	MBits         int    `json:",omitempty"`
	ReservedPorts []Port
	DynamicPorts  []Port
}

// Port is a labelled port; Value is the host port, To the port inside.
type Port struct {
	Label       string
	Value       int
	To          int
	HostNetwork string `json:",omitempty"`
}

// LogConfig bounds a task's rotated logs (Nomad: logs block).
type LogConfig struct {
	MaxFiles      int
	MaxFileSizeMB int
	Disabled      bool
}

// Artifact is a file fetched into the task directory before the task starts
// (Nomad: artifact block). GetterOptions["checksum"] is "sha256:<hex>".
type Artifact struct {
	GetterSource   string
	GetterOptions  map[string]string
	GetterHeaders  map[string]string
	GetterMode     string
	GetterInsecure bool
	RelativeDest   string
}

// Template is a file rendered into the task directory (Nomad: template block).
type Template struct {
	SourcePath   string
	DestPath     string
	EmbeddedTmpl string
	ChangeMode   string
	ChangeSignal string
	Perms        string
	LeftDelim    string
	RightDelim   string
	Envvars      bool
}

// JobSubmission is the source text that a job version was submitted as, kept so
// that `nomad job inspect -hcl` and Terraform get it back byte for byte.
type JobSubmission struct {
	Namespace      string
	JobID          string
	Version        uint64
	Source         string
	Format         string // hcl2 or json
	VariableFlags  map[string]string
	Variables      string
	JobModifyIndex uint64 `json:"JobIndex"`
}

// JobSummary counts a job's allocations by group and client status.
type JobSummary struct {
	JobID       string
	Namespace   string
	Summary     map[string]TaskGroupSummary
	Children    *ChildrenSummary // of a job that has children instead of allocations; nil for others
	CreateIndex uint64
	ModifyIndex uint64
}

// TaskGroupSummary counts one group's allocations. Queued are those that the last
// evaluation could not place.
type TaskGroupSummary struct {
	Queued, Complete, Failed, Running, Starting, Lost, Unknown int
}
