package cluster

import "maps"

func (t *tx) orderDevice(c *OrderDevice) *Error {
	old := t.Node(nil, c.NodeID)
	if old == nil {
		return Errorf(CodeNotFound, "node not found")
	}
	if old.Device(c.DeviceID) == nil {
		return Errorf(CodeNotFound, "node %s has no device %q", old.Name, c.DeviceID)
	}
	had := old.DeviceOrders[c.DeviceID]
	switch o := c.Order; {
	case o == nil && had == nil:
		return nil
	case o == nil:
	case o.Order != DeviceCordon && o.Order != DeviceTrust:
		return Errorf(CodeInvalid, "order %q of a device: use %s or %s", o.Order, DeviceCordon, DeviceTrust)
	case had == nil && len(old.DeviceOrders) >= MaxDeviceOrders:
		return Errorf(CodeInvalid, "node %s has orders about %d devices, which is the most: end some", old.Name, MaxDeviceOrders)
	}
	n := *old
	n.NodeResources = cloneDevices(old.NodeResources)
	n.DeviceOrders = maps.Clone(old.DeviceOrders)
	for _, id := range sortedKeys(old.DeviceOrders) { // what the node says shows again
		if d, o := n.Device(id), old.DeviceOrders[id]; d != nil {
			d.Healthy, d.HealthDescription = o.Healthy, o.HealthDescription
		}
	}
	delete(n.DeviceOrders, c.DeviceID)
	if c.Order != nil {
		o := *c.Order
		o.Since = Time(t.stamp.Time)
		if n.DeviceOrders == nil {
			n.DeviceOrders = map[string]*DeviceOrder{}
		}
		n.DeviceOrders[c.DeviceID] = &o
	}
	obey(&n)
	t.judgeDevices(old, &n)
	return nil
}

// cloneDevices copies resources as far as the health of devices.
func cloneDevices(r *NodeResources) *NodeResources {
	out := *r
	out.Devices = make([]*NodeDeviceResource, len(r.Devices))
	for i, g := range r.Devices {
		c := *g
		c.Instances = make([]*NodeDevice, len(g.Instances))
		for j, d := range g.Instances {
			device := *d
			c.Instances[j] = &device
		}
		out.Devices[i] = &c
	}
	return &out
}

// obey writes the operator's orders over what the node says of its devices. A trust ends
// when the node says the same, or something new.
func obey(n *Node) {
	orders := map[string]*DeviceOrder{}
	for _, id := range sortedKeys(n.DeviceOrders) {
		o, d := *n.DeviceOrders[id], n.Device(id)
		if d == nil {
			orders[id] = &o // it may come back
			continue
		}
		was := o.HealthDescription
		o.Healthy, o.HealthDescription = d.Healthy, d.HealthDescription
		switch {
		case o.Order == DeviceCordon:
			d.Healthy, d.HealthDescription = false, "cordoned by an operator"
			if o.Reason != "" {
				d.HealthDescription += ": " + o.Reason
			}
		case d.Healthy || was != "" && was != d.HealthDescription:
			continue
		default:
			d.Healthy, d.HealthDescription = true, ""
		}
		orders[id] = &o
	}
	n.DeviceOrders = orders
	if len(orders) == 0 {
		n.DeviceOrders = nil
	}
}

// judgeDevices stores the node in place of old, with what became of its devices in its
// events, and evaluates the jobs whose work must leave one that it could use before.
func (t *tx) judgeDevices(old, n *Node) {
	for _, g := range n.NodeResources.Devices {
		for _, d := range g.Instances {
			was := old.Device(d.ID)
			switch {
			case d.Healthy:
				d.UnhealthySince = 0
			case was != nil && !was.Healthy && was.UnhealthySince != 0:
				d.UnhealthySince = was.UnhealthySince
			default:
				d.UnhealthySince = Time(t.stamp.Time)
			}
			if was == nil || was.Healthy == d.Healthy && was.HealthDescription == d.HealthDescription {
				continue
			}
			details := map[string]string{"device": d.ID}
			if d.HealthDescription != "" {
				details["reason"] = d.HealthDescription
			}
			message := "Device " + d.ID + " is healthy"
			if !d.Healthy {
				message = "Device " + d.ID + " is unhealthy: " + d.HealthDescription
			}
			t.nodeEvent(n, message, details)
		}
	}
	t.putNode(n)
	worse := map[string]bool{}
	for _, g := range old.NodeResources.Devices {
		for _, d := range g.Instances {
			if old.Unfit(d.ID) == "" && n.Unfit(d.ID) != "" {
				worse[d.ID] = true
			}
		}
	}
	if len(worse) == 0 {
		return
	}
	var keys []JobKey
	for _, a := range t.AllocsByNode(nil, n.ID) {
		// Also what has failed and waits for its next try: the device was at fault.
		if a.ServerTerminal() || a.ClientTerminal() && (a.ClientStatus != AllocClientFailed || a.NextAllocation != "") {
			continue
		}
		a.AllocatedResources.Devices(func(id string) bool {
			if worse[id] {
				keys = append(keys, a.JobKey())
			}
			return !worse[id]
		})
	}
	t.evalJobs(keys, TriggerNodeUpdate, func(e *Evaluation) {
		e.NodeID, e.NodeModifyIndex = n.ID, t.index
	})
}
