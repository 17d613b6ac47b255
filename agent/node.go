package agent

import (
	"maps"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/cluster"
)

// Host ports that the scheduler may give out, as Nomad's defaults.
const (
	minDynamicPort = 20000
	maxDynamicPort = 32000
)

// dialectVersion is the Nomad release whose API and job dialect the node serves;
// jobs may constrain on ${attr.nomad.version}.
const dialectVersion = "1.11.1"

// fingerprint describes the node as it is now.
func (a *Agent) fingerprint() *cluster.Node {
	h := a.host
	n := &cluster.Node{
		ID: a.nodeID, Name: a.cfg.Name, Datacenter: a.cfg.Datacenter, NodePool: a.cfg.NodePool, NodeClass: a.cfg.NodeClass,
		Meta: maps.Clone(a.cfg.Meta), Status: cluster.NodeStatusReady, SchedulingEligibility: cluster.NodeEligible,
		Attributes: map[string]string{
			"kernel.name": "linux", "kernel.version": h.kernel, "kernel.arch": h.machine,
			"cpu.arch": goArch, "cpu.numcores": strconv.Itoa(h.cores), "cpu.modelname": h.model,
			"cpu.frequency":    strconv.FormatInt(h.mhz, 10),
			"cpu.totalcompute": strconv.FormatInt(h.mhz*int64(h.cores), 10),
			"os.name":          h.osName, "os.version": h.osVersion, "os.cgroups.version": h.cgroups,
			"memory.totalbytes":         strconv.FormatInt(h.memory, 10),
			"unique.hostname":           h.hostname,
			"unique.network.ip-address": a.cfg.Address,
			"unique.storage.volume":     h.diskDevice,
			"unique.storage.bytestotal": strconv.FormatInt(h.diskTotal, 10),
			"nomad.version":             dialectVersion,
			"rxvision.version":          a.cfg.Version,
		},
		NodeResources: &cluster.NodeResources{
			Cpu:    cluster.NodeCPU{CpuShares: h.mhz * int64(h.cores), TotalCpuCores: uint16(h.cores)},
			Memory: cluster.NodeMemory{MemoryMB: h.memory >> 20},
			Disk:   cluster.NodeDisk{DiskMB: h.diskTotal >> 20},
			Networks: []*cluster.NetworkResource{{
				Mode: "host", Device: a.cfg.Interface, IP: a.cfg.Address, CIDR: hostCIDR(a.cfg.Address), MBits: 1000,
			}},
			MinDynamicPort: minDynamicPort, MaxDynamicPort: maxDynamicPort,
		},
		ReservedResources: &cluster.NodeReservedResources{},
	}
	for i := range h.cores {
		n.NodeResources.Cpu.ReservableCpuCores = append(n.NodeResources.Cpu.ReservableCpuCores, uint16(i))
	}
	n.ReservedResources.Cpu.CpuShares = a.cfg.ReservedCPU
	n.ReservedResources.Memory.MemoryMB = a.cfg.ReservedMemoryMB
	n.ReservedResources.Disk.DiskMB = a.cfg.ReservedDiskMB
	drivers, attrs := a.drivers.Fingerprints()
	n.Drivers = drivers
	maps.Copy(n.Attributes, attrs)
	a.addGPUs(n)
	a.addSpot(n)
	for k, v := range n.Attributes {
		if v == "" {
			delete(n.Attributes, k)
		}
	}
	now := cluster.TimeOf(time.Now())
	for name, d := range n.Drivers {
		d.UpdateTime = now
		if old := a.nodeRecord(); old != nil && sameDriver(old.Drivers[name], d) {
			d.UpdateTime = old.Drivers[name].UpdateTime
		}
	}
	return n
}

func hostCIDR(ip string) string {
	if strings.Contains(ip, ":") {
		return ip + "/128"
	}
	return ip + "/32"
}

func sameDriver(a, b *cluster.DriverInfo) bool {
	return a != nil && a.Detected == b.Detected && a.Healthy == b.Healthy && a.HealthDescription == b.HealthDescription
}

// addGPUs adds the GPUs as Nomad devices, with what is known of the driver.
func (a *Agent) addGPUs(n *cluster.Node) {
	inv, err := a.gpus.Inventory()
	if err != nil {
		a.log.Error("GPUs could not be listed; they count as they were", "error", err)
		if old := a.nodeRecord(); old != nil {
			n.NodeResources.Devices = old.NodeResources.Devices
		}
		return
	}
	a.noteFaults(inv)
	for _, w := range inv.Warnings {
		a.warnOnce(w)
	}
	if inv.DriverVersion != "" {
		n.Attributes["nvidia.driver_version"] = inv.DriverVersion
	}
	if inv.CUDAVersion != "" {
		n.Attributes["nvidia.cuda_version"] = inv.CUDAVersion
	}
	for _, g := range inv.Groups() {
		n.NodeResources.Devices = append(n.NodeResources.Devices, deviceGroup(g))
	}
}

func deviceGroup(g gpu.Group) *cluster.NodeDeviceResource {
	d := &cluster.NodeDeviceResource{Vendor: g.Vendor, Type: g.Type, Name: g.Name, Attributes: map[string]*cluster.Attribute{}}
	for name, v := range g.Attributes {
		a := cluster.Attribute(v)
		d.Attributes[name] = &a
	}
	for _, m := range g.Members {
		dev := &cluster.NodeDevice{ID: m.ID, Healthy: m.Health.Healthy, HealthDescription: m.Health.Reason, Links: m.Links}
		if m.PCIBusID != "" {
			dev.Locality = &cluster.NodeDeviceLocality{PciBusID: m.PCIBusID}
		}
		d.Instances = append(d.Instances, dev)
	}
	return d
}

// nodeRecord is the node as last described. It is shared: do not change it.
func (a *Agent) nodeRecord() *cluster.Node {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.node
}

// refreshNode describes the node anew and tells the servers if that changed it.
func (a *Agent) refreshNode() {
	n := a.fingerprint()
	a.mu.Lock()
	n.Revision = a.node.Revision
	changed := !reflect.DeepEqual(a.node, n)
	if changed {
		n.Revision++
		a.node = n
	}
	a.mu.Unlock()
	if changed {
		select {
		case a.nodeChanged <- struct{}{}:
		default:
		}
	}
}
