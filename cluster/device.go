package cluster

// What an operator can order of a device.
const (
	// DeviceCordon keeps new work off a device, whatever its node finds.
	DeviceCordon = "cordon"
	// DeviceTrust gives a device to work again that its node finds unhealthy, until
	// the node finds something else.
	DeviceTrust = "trust"
)

// MaxDeviceOrders bounds Node.DeviceOrders.
const MaxDeviceOrders = 256

// DeviceOrder is what an operator has decided of one device of a node, against what
// the node finds. It stands with the node's record, so that it outlives agents; what
// they find is kept aside until the order ends.
type DeviceOrder struct {
	Order             string // DeviceCordon or DeviceTrust
	Move              bool   // of a cordon: what runs on the device is moved elsewhere too
	Reason            string // the operator's, may be empty
	Since             Time
	Healthy           bool // what the node itself says of the device meanwhile
	HealthDescription string
}

// OrderDevice sets, or with a nil Order ends, an operator's order about a device of a
// node; DeviceID is that of its record: a GPU's or a MIG slice's UUID.
type OrderDevice struct {
	Stamp
	NodeID, DeviceID string
	Order            *DeviceOrder
}

func (*OrderDevice) kind() Kind { return KindOrderDevice }

// How two devices of a node reach each other, of NodeDevice.Links: the higher, the
// closer. Levels up to LinkBoard are those of NVML's nvmlDeviceGetTopologyCommonAncestor.
const (
	LinkUnknown    = 0 // or the device itself
	LinkSystem     = 1 // over the connection between NUMA nodes
	LinkNUMA       = 2 // within a NUMA node, over the connection between host bridges
	LinkHostBridge = 3 // over one host bridge
	LinkSwitches   = 4 // over several PCIe switches
	LinkSwitch     = 5 // over one PCIe switch
	LinkBoard      = 6 // on one board
	LinkNVLink     = 7 // over one NVLink; each further one counts 1 more
	LinkMost       = 32
)

// Device finds a device of the node by its ID; nil when it has none such.
func (n *Node) Device(id string) *NodeDevice {
	if n.NodeResources == nil {
		return nil
	}
	for _, g := range n.NodeResources.Devices {
		for _, d := range g.Instances {
			if d.ID == id {
				return d
			}
		}
	}
	return nil
}

// Unfit says why work must leave a device of the node, "" when it may stay: the node
// does not have it, finds it unhealthy, or an operator wants it empty. An unhealthy
// device gets no new work either; one that is only cordoned keeps what it has.
func (n *Node) Unfit(deviceID string) string {
	d := n.Device(deviceID)
	switch o := n.DeviceOrders[deviceID]; {
	case d == nil:
		return "the node does not have it any more"
	case d.Healthy, o != nil && o.Order == DeviceCordon && !o.Move && o.Healthy:
		return ""
	case d.HealthDescription != "":
		return d.HealthDescription
	}
	return "unhealthy"
}

// Devices calls fn with the ID of each device that the allocation holds, wholly or in
// part, until fn returns false.
func (r *AllocatedResources) Devices(fn func(id string) bool) {
	if r == nil {
		return
	}
	for _, t := range r.Tasks {
		for _, d := range t.Devices {
			for _, id := range d.DeviceIDs {
				if !fn(id) {
					return
				}
			}
		}
	}
}

// UnfitDevice names a device that the allocation holds on its node and that it must
// leave, and says why; "" for none. Of several it is the first by ID.
func (n *Node) UnfitDevice(a *Allocation) (id, why string) {
	a.AllocatedResources.Devices(func(held string) bool {
		if reason := n.Unfit(held); reason != "" && (id == "" || held < id) {
			id, why = held, reason
		}
		return true
	})
	return id, why
}
