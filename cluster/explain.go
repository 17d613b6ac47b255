package cluster

// What is told of a job that waits, or of one that is not registered yet. Nothing here is stored: placement and the
// scheduler make it of one snapshot, the API shows it. Lists are bounded by MaxExplained.

// MaxExplained bounds each list of an explanation; what is left out is counted.
const MaxExplained = 10

// Explanation says of a job what runs, what waits and why, and what the scheduler's next plan for it does: for a job
// that is registered, or as if it were.
type Explanation struct {
	Namespace, JobID, Type string
	Status                 string // of the job that is registered, "" for none
	Version                uint64 // that is explained
	Priority               int
	Stop                   bool   `json:",omitempty"` // it was stopped
	Spawns                 string `json:",omitempty"` // periodic or parameterized: only its children run
	Index                  uint64 // of the state that was looked at
	Time                   Time   // when
	Groups                 []*GroupStanding
	Waits                  []*Wait           `json:",omitempty"` // what keeps it waiting besides room
	Preempts               []*Victim         `json:",omitempty"` // what the next plan preempts
	Evaluations            []*OpenEvaluation `json:",omitempty"` // the oldest first
	Queue                  *QueuePosition    `json:",omitempty"` // nil: nothing of it waits in the scheduler's queue
	Quota                  *QuotaStanding    `json:",omitempty"` // nil: no quota limits its namespace
}

// GroupStanding is how one task group stands.
type GroupStanding struct {
	Name     string
	Desired  int
	Running  int  // allocations
	Starting int  `json:",omitempty"` // placed, not running yet
	Ending   int  `json:",omitempty"` // told to stop, not over yet
	Unknown  int  `json:",omitempty"` // on nodes that are not heard of
	Done     int  `json:",omitempty"` // ended well, and stay so
	Failed   int  `json:",omitempty"` // failed, and not replaced (yet)
	Gang     bool `json:",omitempty"`

	Runs     []*NodeShare `json:",omitempty"` // where it runs, or starts
	MoreRuns int          `json:",omitempty"` // nodes that Runs leaves out

	Queued     int            // allocations that find no place at the moment
	Places     []*PlannedSeat `json:",omitempty"` // what the next plan places, at once or once others have left
	MorePlaces int            `json:",omitempty"`

	Failure   *AllocMetric    `json:",omitempty"` // of the first without a place, as an evaluation has it
	Nodes     *NodeCounts     `json:",omitempty"` // of a group that has Queued
	Filters   []*NodeReason   `json:",omitempty"` // why nodes cannot run it, however empty they are
	Shortages []*Shortage     `json:",omitempty"` // of what those that can have too little left: all of it, not the first only
	Unfit     []*UnfitDevice  `json:",omitempty"` // devices that it could use if they were in use
	MoreUnfit int             `json:",omitempty"`
	Holders   []*Holder       `json:",omitempty"` // who holds what is short
	Others    *Holder         `json:",omitempty"` // the sum of those that Holders leaves out
	Preempt   *PreemptVerdict `json:",omitempty"`
	Start     *Start          `json:",omitempty"` // nil: nothing of it waits
}

// NodeShare is what runs on one node.
type NodeShare struct {
	NodeID, NodeName string
	Allocs           int
	Since            Time // when the first of them started
}

// PlannedSeat is an allocation that the next plan places.
type PlannedSeat struct {
	Name             string
	NodeID, NodeName string
	Devices          []*SeatDevice `json:",omitempty"`
	CPU, MemoryMB    int64
	Ports            []int        `json:",omitempty"`
	Scores           []*NodeScore `json:",omitempty"` // the best nodes, this one first
	Claim            bool         `json:",omitempty"` // it waits until others have left the place
	Awaits           int          `json:",omitempty"` // allocations that must end first
}

// SeatDevice is a device, or a share of one.
type SeatDevice struct {
	ID      string
	Kind    string // VENDOR/TYPE/NAME
	Ordinal int    // among the node's devices of the vendor and type
	Milli   int64  `json:",omitempty"` // of a share; 0 with MiB 0: all of it
	MiB     int64  `json:",omitempty"`
}

// NodeCounts counts the region's nodes by the first thing that keeps a group off.
type NodeCounts struct {
	Total       int
	NotReady    map[string]int `json:",omitempty"` // by why: down, disconnected, initializing, ineligible, draining
	OtherPool   int            `json:",omitempty"`
	OtherCenter int            `json:",omitempty"` // datacenter
	Filtered    int            `json:",omitempty"`
	Full        int            `json:",omitempty"` // they can run it, and have too little left
	Free        int            `json:",omitempty"` // they have room for one more
}

// NodeReason is one reason against some nodes.
type NodeReason struct {
	Reason   string // in upstream's words
	Nodes    int
	Examples []string `json:",omitempty"` // names of nodes
}

// Shortage is one thing of which nodes have too little left. Amounts are sums over the nodes that are short of it.
type Shortage struct {
	What     string   // cpu, memory, disk, a device's name as the job asks for it, or what is wrong with ports
	Unit     string   // MHz, MiB, devices, milli; "" where there is no amount
	Nodes    int      // that are short of it
	Examples []string `json:",omitempty"`
	Asked    int64    // by one allocation
	Most     int64    // left on one node, of a share: on one device
	Free     int64
	Total    int64
}

// UnfitDevice is a device that gets no work.
type UnfitDevice struct {
	NodeID, NodeName, DeviceID string
	Order                      string `json:",omitempty"` // cordon: an operator's
	Why                        string
}

// Holder is a job that holds what others are short of, on the nodes that could run them. Namespace and JobID are
// empty where the caller may not know them.
type Holder struct {
	Namespace, JobID string
	Jobs             int  `json:",omitempty"` // more than one where several are told of together
	Hidden           bool `json:",omitempty"` // names are left out: the caller may not see the namespace
	Own              bool `json:",omitempty"` // the job that is explained
	Claim            bool `json:",omitempty"` // it does not run there yet: the places are kept for it
	Reserved         bool `json:",omitempty"` // a reservation: from Since on the places are kept for it; what ends before may use them
	Priority         int
	Allocs, Nodes    int
	Milli            int64       `json:",omitempty"` // thousandths of devices of those that are short
	CPU, MemoryMB    int64       `json:",omitempty"` // where these are short
	DiskMB           int64       `json:",omitempty"`
	Ports            int         `json:",omitempty"`
	Since            Time        // when the first of them started, or is to
	Until            Time        `json:",omitempty"` // when the last of them ends, by what the job says; 0: it does not say
	Preemptible      int         // allocations that could be preempted
	Obstacles        []*Obstacle `json:",omitempty"` // why the others could not
}

// Join adds another holder to those that h tells of together. On how many nodes they are is not known then.
func (h *Holder) Join(o *Holder) {
	h.Jobs += max(o.Jobs, 1)
	h.Nodes = 0
	h.Allocs, h.Milli, h.CPU, h.MemoryMB, h.DiskMB = h.Allocs+o.Allocs, h.Milli+o.Milli, h.CPU+o.CPU, h.MemoryMB+o.MemoryMB, h.DiskMB+o.DiskMB
	h.Ports, h.Preemptible, h.Priority = h.Ports+o.Ports, h.Preemptible+o.Preemptible, max(h.Priority, o.Priority)
}

// What keeps an allocation from being preempted.
const (
	ObstaclePriority   = "priority"       // its job's is not lower enough
	ObstacleNever      = "rx_preemptible" // it says false
	ObstacleMinRuntime = "rx_min_runtime" // its time is not over
	ObstacleSystem     = "system"         // it runs on every node
	ObstacleEnding     = "ending"         // it is on its way to its end
	ObstacleOwn        = "own"            // it is of the same job
	ObstacleSwitch     = "switch"         // preemption is off for such jobs; What names the switch
	ObstacleAllAtOnce  = "all_at_once"    // jobs that are placed all at once preempt nothing
	ObstacleType       = "type"           // jobs of this type preempt nothing
)

// Obstacle is what keeps allocations from being preempted.
type Obstacle struct {
	Kind   string
	What   string `json:",omitempty"`
	Allocs int    `json:",omitempty"`
	Until  Time   `json:",omitempty"` // of a time: when the first is over
}

// PreemptVerdict says whether preempting could make room for one more allocation of a group, for all of a gang.
type PreemptVerdict struct {
	Helps     bool        // there are allocations without which there would be room
	Obstacles []*Obstacle `json:",omitempty"` // why it is not done all the same
	Victims   []*Victim   `json:",omitempty"` // the cheapest
	TooLarge  bool        `json:",omitempty"` // it was not tried: too many nodes
}

// Victim is an allocation that is, or would be, preempted.
type Victim struct {
	AllocID, Name           string
	Namespace, JobID, Group string
	NodeID, NodeName        string
	Hidden                  bool   `json:",omitempty"`
	For                     string `json:",omitempty"` // the allocation that it makes room for
	Priority                int
	Since                   Time        // when it started
	Checkpoint              *Checkpoint `json:",omitempty"` // its last one
	LostSeconds             int64       // work since then, or since its start
	Milli                   int64       // thousandths of devices that it holds
}

// Kinds of Wait.
const (
	WaitPaused   = "scheduler-paused" // the operator has paused scheduling
	WaitHold     = "hold"             // replacements are held: too many nodes are silent
	WaitChildren = "children"         // other children of its parent run
	WaitClaims   = "claims"           // others are about to leave the places that it will take
	WaitEnds     = "ends"             // what it replaces has not ended
	WaitDelay    = "delay"            // a time must come, such as that of a rescheduling
	WaitPromote  = "promotion"        // canaries wait to be promoted
	WaitHealth   = "health"           // a deployment waits for health
	WaitHalted   = "deployment"       // a deployment has failed or is paused
	WaitQuota    = "quota"
)

// Wait is one thing other than room that a job, or a group of it, waits for.
type Wait struct {
	Kind   string
	Group  string    `json:",omitempty"`
	Until  Time      `json:",omitempty"` // when it is over, as far as that is known
	Why    string    `json:",omitempty"` // in the scheduler's words
	ID     string    `json:",omitempty"` // of the deployment or evaluation
	Awaits []*Victim `json:",omitempty"` // of claims: those that are to leave
	More   int       `json:",omitempty"` // … that Awaits leaves out
}

// OpenEvaluation is an evaluation of the job that is not answered for good.
type OpenEvaluation struct {
	ID, Status, TriggeredBy, Description string
	CreateTime                           int64
	WaitUntil                            Time `json:",omitempty"`
}

// QueuePosition is where a job stands among all that wait for the leader's scheduler. What goes first is what has the
// higher priority, then what waits for its own place, then the namespace that holds the smaller share of the region,
// then what is older. It is of one moment: shares change with each placement.
type QueuePosition struct {
	Position    int // 1: it is the next
	Of          int // jobs that wait
	InPriority  int // position among those of its priority
	OfPriority  int
	InNamespace int // … of its namespace
	OfNamespace int
	Share       float64 // the namespace's dominant share of the region, what it has held lately included
	Held        float64 // … without that
	Blocked     bool    // it was tried and found no room; it is tried again when some appears
	Planning    bool    `json:",omitempty"` // a worker has it at this moment
	Attempts    int     `json:",omitempty"` // plans of it that were refused
	WaitUntil   Time    `json:",omitempty"` // it waits for its time
	Paused      bool    `json:",omitempty"` // the operator has paused scheduling
}

// QuotaStanding is how the quota of a namespace stands.
type QuotaStanding struct {
	Quota      string
	Cohort     string   `json:",omitempty"`
	Exceeded   []string `json:",omitempty"` // in upstream's words: what the job would need more of
	Lines      []*QuotaLine
	Namespaces []*QuotaUser // that share the quota, or lend and borrow within the cohort
	More       int          `json:",omitempty"` // … that Namespaces leaves out
}

// QuotaLine is one limit, in MHz, MiB or thousandths of devices.
type QuotaLine struct {
	Name    string // as the quota says it
	Whole   bool   `json:",omitempty"` // it counts devices; amounts here are thousandths
	Limit   int64
	Ceiling int64 // with what may be borrowed
	Used    int64
	Firm    int64 // of it, by work that may not be preempted
}

// QuotaUser is a namespace that uses a quota or its cohort.
type QuotaUser struct {
	Namespace string
	Hidden    bool `json:",omitempty"`
	Quota     string
	Allocs    int64
	Used      map[string]int64 `json:",omitempty"` // by the limit's name, where something is held
}

// Start says when what waits of a group can start at the earliest, as far as jobs say how long they run.
type Start struct {
	Now     bool
	At      Time      `json:",omitempty"` // 0 with Now false: nobody knows
	Because []*Holder `json:",omitempty"` // those that are to end first, or that do not say when
	Never   bool      `json:",omitempty"` // whoever ends: the nodes that are there cannot hold it
}
