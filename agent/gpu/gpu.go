// Package gpu tells what GPUs a node has, how they are, and what they do.
//
// A [Source] answers from NVML (NVIDIA's management library, through the cgo binding github.com/NVIDIA/go-nvml, which no
// other package imports), from nothing on a node without GPUs, or from a script in tests. [Open] picks: where NVML cannot
// be used it returns the empty source together with an error wrapping [ErrNoNVML] that says why, so a CPU-only node logs one
// line and goes on. The whole package builds without cgo; then Open always answers so.
//
// [Inventory.Groups], [Device.Attributes] and [Stats.Values] put the findings into the words of Nomad's own NVIDIA device
// plugin (vendor "nvidia", type "gpu", the model as name; attribute and statistic names and units as there), so that
// constraints written for it work unchanged. A MIG slice is a device of type "mig-PROFILE", e.g. "nvidia/mig-1g.10gb".
package gpu

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
)

// ErrNoNVML says that there is no usable NVML: no library, no driver, or a program built without cgo.
var ErrNoNVML = errors.New("NVML is not available")

// errNoDevice is a self-test's answer about a device that is not there.
var errNoDevice = errors.New("there is no such device")

// Source answers what GPUs there are. Its methods may be called from several goroutines; one Watch at a time.
type Source interface {
	// Inventory lists the GPUs by index. It is cheap enough for every few seconds, and is how a changed MIG layout shows.
	Inventory() (Inventory, error)
	// Stats measures every GPU and MIG slice once. A GPU that does not answer is left out.
	Stats() ([]Stats, error)
	// Watch reports changes of health until ctx ends, which is its only way to return nil. report is called from Watch's
	// own goroutine and must not call Close. What is unhealthy when it begins is reported first.
	Watch(ctx context.Context, report func(Event)) error
	// SelfTest says whether a GPU or MIG slice that is unhealthy may be given to work again: nil, or what speaks against it.
	SelfTest(uuid string) error
	// Fail enters a fault that was found before this source was opened.
	Fail(uuid, reason string)
	// Readmit ends the fault of a device, which nothing else does.
	Readmit(uuid string)
	// Close lets go of the library, after Watch has returned.
	Close() error
}

// Inventory is what a node has.
type Inventory struct {
	DriverVersion string   // e.g. "550.54.15"
	CUDAVersion   string   // newest that the driver supports, e.g. "12.4"
	Devices       []Device // by index
	Warnings      []string // what could not be found out, for the log
}

// Device is one physical GPU. Zero numbers and empty strings mean that the GPU does not tell.
type Device struct {
	UUID              string // "GPU-…"
	Index             int    // NVML's order: by PCI bus
	Minor             int    // N of /dev/nvidiaN; -1: unknown
	Model             string // e.g. "NVIDIA H100 80GB HBM3"
	MemoryMiB         int64
	BAR1MiB           int64
	PCIBusID          string // e.g. "00000000:0A:00.0"
	PCIBandwidth      int64  // MB/s in one direction at the widest and fastest link that GPU and slot support
	NUMANode          int    // of the host, nearest to the GPU; -1: unknown
	ComputeCapability string // e.g. "9.0"
	PowerLimitW       int64
	CoreClockMHz      int64 // highest
	MemoryClockMHz    int64 // highest
	ECC               Switch
	Display           Switch // whether a display is connected
	Persistence       Switch
	MIG               Switch         // off also where the GPU has no MIG
	Links             map[string]int // by UUID of other GPUs, how this one reaches them: cluster.LinkSystem and above
	Slices            []Slice        // of MIG, when it is on; then only these can be given to tasks
	Health            Health
}

// Slice is one MIG device: a compute instance within a GPU instance, with its own memory.
type Slice struct {
	UUID      string // "MIG-…"
	Profile   string // e.g. "1g.10gb", "1c.3g.40gb"
	MemoryMiB int64
	GPU       int // GPU instance ID
	Compute   int // compute instance ID
	Health    Health
}

// Health is whether work may be given to a device. The zero value is unknown and reads as unhealthy.
type Health struct {
	Healthy bool
	Reason  string // when unhealthy: a sentence for an operator
}

// Event is a change of the health of the GPU or MIG slice with this UUID. The change of a GPU is that of all its slices.
type Event struct {
	UUID string
	Health
	XID uint64 // NVIDIA's error number, 0 when there is none
}

// Switch is a mode of a GPU as it is shown to people: Enabled, Disabled, or empty when the GPU does not tell.
type Switch string

// The values of a Switch.
const (
	Enabled  Switch = "Enabled"
	Disabled Switch = "Disabled"
)

// Attribute is a typed value; exactly one of the pointers is set. Its layout is that of cluster.Attribute.
type Attribute struct {
	Int    *int64
	String *string
	Bool   *bool
	Unit   string
}

// Group is a set of like devices, what Nomad calls a device group.
type Group struct {
	Vendor, Type, Name string
	Attributes         map[string]Attribute
	Members            []Member
}

// Member is one device of a Group.
type Member struct {
	ID       string // UUID; also what to put into NVIDIA_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES
	PCIBusID string
	Health   Health
	Links    []int // to each member, in their order; nil: unknown
}

// Vendor and the types of Groups; a MIG group's type is TypeMIGPrefix and the profile.
const (
	Vendor        = "nvidia"
	TypeGPU       = "gpu"
	TypeMIGPrefix = "mig-"
)

// Groups sorts what can be given to tasks into device groups, in the order of the first member's index. A GPU with MIG on
// counts only by its slices. As in Nomad, the attributes of a group are those of its first member.
func (inv Inventory) Groups() []Group {
	var groups []Group
	links := map[string]map[string]int{}
	add := func(typ, name string, attributes map[string]Attribute, m Member) {
		i := slices.IndexFunc(groups, func(g Group) bool { return g.Type == typ && g.Name == name })
		if i < 0 {
			i = len(groups)
			groups = append(groups, Group{Vendor: Vendor, Type: typ, Name: name, Attributes: attributes})
		}
		groups[i].Members = append(groups[i].Members, m)
	}
	devices := slices.Clone(inv.Devices)
	slices.SortStableFunc(devices, func(a, b Device) int { return cmp.Compare(a.Index, b.Index) })
	for _, d := range devices {
		common := d.Attributes()
		str(common, "driver_version", inv.DriverVersion)
		str(common, "cuda_version", inv.CUDAVersion)
		if d.MIG != Enabled {
			add(TypeGPU, d.Model, common, Member{ID: d.UUID, PCIBusID: d.PCIBusID, Health: d.Health})
			links[d.UUID] = d.Links
			continue
		}
		for _, s := range d.Slices {
			add(TypeMIGPrefix+s.Profile, d.Model, s.attributes(common), Member{ID: s.UUID, PCIBusID: d.PCIBusID, Health: d.healthOf(s)})
		}
	}
	for _, g := range groups {
		for i := range g.Members {
			to := links[g.Members[i].ID]
			for _, other := range g.Members {
				if len(to) > 0 {
					g.Members[i].Links = append(g.Members[i].Links, to[other.ID])
				}
			}
		}
	}
	return groups
}

// healthOf is the health of a slice: no better than that of its GPU.
func (d Device) healthOf(s Slice) Health {
	if !d.Health.Healthy {
		return d.Health
	}
	return s.Health
}

// Attributes names what a job's constraints can ask for as ${device.attr.NAME}: memory (MiB), power (W), bar1 (MiB),
// cores_clock and memory_clock (MHz), pci_bandwidth (MB/s), display_state and persistence_mode as Nomad's plugin does, and
// beside them compute_capability, ecc_mode, mig_mode, numa_node. Groups adds driver_version and cuda_version.
func (d Device) Attributes() map[string]Attribute {
	m := make(map[string]Attribute)
	num(m, "memory", d.MemoryMiB, "MiB")
	num(m, "power", d.PowerLimitW, "W")
	num(m, "bar1", d.BAR1MiB, "MiB")
	num(m, "cores_clock", d.CoreClockMHz, "MHz")
	num(m, "memory_clock", d.MemoryClockMHz, "MHz")
	num(m, "pci_bandwidth", d.PCIBandwidth, "MB/s")
	str(m, "display_state", string(d.Display))
	str(m, "persistence_mode", string(d.Persistence))
	str(m, "compute_capability", d.ComputeCapability)
	str(m, "ecc_mode", string(d.ECC))
	str(m, "mig_mode", string(d.MIG))
	if d.NUMANode >= 0 {
		n := int64(d.NUMANode)
		m["numa_node"] = Attribute{Int: &n}
	}
	return m
}

// attributes of a slice are those of its GPU where they hold for a part of it too.
func (s Slice) attributes(gpu map[string]Attribute) map[string]Attribute {
	m := make(map[string]Attribute)
	for _, name := range []string{
		"driver_version", "cuda_version", "compute_capability", "persistence_mode", "display_state", "ecc_mode",
		"cores_clock", "memory_clock", "pci_bandwidth", "numa_node",
	} {
		if a, ok := gpu[name]; ok {
			m[name] = a
		}
	}
	num(m, "memory", s.MemoryMiB, "MiB")
	str(m, "mig_profile", s.Profile)
	return m
}

func num(m map[string]Attribute, name string, v int64, unit string) {
	if v > 0 {
		m[name] = Attribute{Int: &v, Unit: unit}
	}
}

func str(m map[string]Attribute, name, v string) {
	if v != "" {
		m[name] = Attribute{String: &v}
	}
}

// profile is the MIG profile at the end of a slice's name ("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), "" if there is none.
func profile(name string) string {
	if i := strings.LastIndex(name, " MIG "); i >= 0 {
		return strings.TrimSpace(name[i+len(" MIG "):])
	}
	return ""
}

// None is the source of a node without GPUs.
type None struct{}

// Inventory is empty.
func (None) Inventory() (Inventory, error) { return Inventory{}, nil }

// Stats are none.
func (None) Stats() ([]Stats, error) { return nil, nil }

// Watch waits for ctx to end.
func (None) Watch(ctx context.Context, _ func(Event)) error { <-ctx.Done(); return nil }

// SelfTest finds no device.
func (None) SelfTest(string) error { return errNoDevice }

// Fail does nothing.
func (None) Fail(string, string) {}

// Readmit does nothing.
func (None) Readmit(string) {}

// Close does nothing.
func (None) Close() error { return nil }
