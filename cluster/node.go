package cluster

import (
	"time"
)

// Node statuses and eligibilities as Nomad's API names them.
const (
	NodeStatusInit         = "initializing"
	NodeStatusReady        = "ready"
	NodeStatusDown         = "down"
	NodeStatusDisconnected = "disconnected"

	NodeEligible   = "eligible"
	NodeIneligible = "ineligible"
)

// Node is a host that an agent owns.
type Node struct {
	ID                    string
	Name                  string
	Datacenter            string
	NodePool              string
	NodeClass             string
	HTTPAddr              string // always empty: servers route client calls over the agent's own stream
	Attributes            map[string]string
	Meta                  map[string]string
	NodeResources         *NodeResources
	ReservedResources     *NodeReservedResources
	Drivers               map[string]*DriverInfo
	Status                string
	StatusDescription     string
	StatusUpdatedAt       int64 // unix seconds
	SchedulingEligibility string
	Drain                 bool
	DrainStrategy         *DrainStrategy
	LastDrain             *DrainMetadata
	Events                []*NodeEvent
	DeviceOrders          map[string]*DeviceOrder `json:",omitempty"` // by device ID, at most MaxDeviceOrders
	Interruption          *Interruption           `json:",omitempty"` // that the agent has heard of, nil for none
	Revision              uint64                  // of what the agent says of itself, see Revision; 0: an agent that keeps no order
	CreateIndex           uint64
	ModifyIndex           uint64
}

// Revision is the order that an agent gives to what it says: it counts its changes
// within a run of the agent, and runs are numbered by the time they start, kept on the
// node's disk so that they never go back. What a node said through one server may reach
// the log after what it said later through another: the rules drop the older word.
func Revision(run uint64, change uint32) uint64 { return run<<32 | uint64(change) }

// Ready says whether new work may be placed on the node.
func (n *Node) Ready() bool {
	return n.Status == NodeStatusReady && n.SchedulingEligibility == NodeEligible && !n.Drain
}

// Silent says whether the servers have not heard of the node for too long.
func (n *Node) Silent() bool {
	return n.Status == NodeStatusDown || n.Status == NodeStatusDisconnected
}

// NodeResources is what a node has.
type NodeResources struct {
	Cpu            NodeCPU
	Memory         NodeMemory
	Disk           NodeDisk
	Networks       []*NetworkResource
	Devices        []*NodeDeviceResource
	MinDynamicPort int
	MaxDynamicPort int
}

// NodeCPU is a node's processor: CpuShares in MHz over all cores.
type NodeCPU struct {
	CpuShares          int64
	TotalCpuCores      uint16
	ReservableCpuCores []uint16
}

// NodeMemory is a node's memory in MiB.
type NodeMemory struct{ MemoryMB int64 }

// NodeDisk is a node's disk for task directories in MiB.
type NodeDisk struct{ DiskMB int64 }

// NodeReservedResources is kept back from placement.
type NodeReservedResources struct {
	Cpu      struct{ CpuShares int64 }
	Memory   struct{ MemoryMB int64 }
	Disk     struct{ DiskMB int64 }
	Networks struct{ ReservedHostPorts string }
}

// NodeDeviceResource is a group of like devices of a node.
type NodeDeviceResource struct {
	Vendor     string // nvidia
	Type       string // gpu
	Name       string // the model
	Instances  []*NodeDevice
	Attributes map[string]*Attribute
}

// ID is VENDOR/TYPE/NAME.
func (d *NodeDeviceResource) ID() string { return d.Vendor + "/" + d.Type + "/" + d.Name }

// MemoryMiB is the memory of each of the devices, by their attribute memory; 0 where
// that is not known.
func (d *NodeDeviceResource) MemoryMiB() int64 {
	if a := d.Attributes["memory"]; a != nil && a.Int != nil && (a.Unit == "MiB" || a.Unit == "") {
		return *a.Int
	}
	return 0
}

// NodeDevice is one device; ID is the vendor's UUID.
type NodeDevice struct {
	ID                string
	Healthy           bool
	HealthDescription string
	Locality          *NodeDeviceLocality
	UnhealthySince    Time  `json:",omitempty"` // 0 while it is healthy
	Links             []int `json:",omitempty"` // how it reaches each device of its group, in their order: LinkSystem…
}

// NodeDeviceLocality is where the device sits on the host.
type NodeDeviceLocality struct{ PciBusID string }

// Attribute is a typed device attribute; exactly one of the values is set.
type Attribute struct {
	Int    *int64  `json:",omitempty"`
	String *string `json:",omitempty"`
	Bool   *bool   `json:",omitempty"`
	Unit   string
}

// DriverInfo is what a node says of one task driver.
type DriverInfo struct {
	Attributes        map[string]string
	Detected          bool
	Healthy           bool
	HealthDescription string
	UpdateTime        Time
}

// NodeEvent is one line of a node's history (at most MaxNodeEvents are kept).
type NodeEvent struct {
	Message     string
	Subsystem   string
	Details     map[string]string
	Timestamp   Time
	CreateIndex uint64
}

// MaxNodeEvents bounds Node.Events; the oldest leave first.
const MaxNodeEvents = 10

// DrainStrategy is a drain under way.
type DrainStrategy struct {
	Deadline         time.Duration // 0: none, negative: force now
	IgnoreSystemJobs bool
	ForceDeadline    Time
	StartedAt        Time
	Interrupted      bool `json:",omitempty"` // the node will be gone: batch work moves at once too
}

// DrainMetadata describes the last drain; Status is draining, complete or canceled.
type DrainMetadata struct {
	StartedAt  Time
	UpdatedAt  Time
	Status     string
	AccessorID string
	Meta       map[string]string
}

// SchedulerConfiguration is the operator's scheduler settings (Nomad: operator
// scheduler). Only what is honoured may be set; the API refuses the rest.
type SchedulerConfiguration struct {
	SchedulerAlgorithm            string // binpack or spread
	PreemptionConfig              PreemptionConfig
	MemoryOversubscriptionEnabled bool
	RejectJobRegistration         bool
	PauseEvalBroker               bool
	CreateIndex                   uint64
	ModifyIndex                   uint64
}

// PreemptionConfig says for which job types preemption is on.
type PreemptionConfig struct {
	SystemSchedulerEnabled   bool
	SysBatchSchedulerEnabled bool
	BatchSchedulerEnabled    bool
	ServiceSchedulerEnabled  bool
}
