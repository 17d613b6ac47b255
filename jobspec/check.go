package jobspec

import (
	"cmp"
	"encoding/hex"
	"maps"
	"net/textproto"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of a job.
const (
	MaxGroups    = 256
	MaxTasks     = 64      // of a group
	MaxCount     = 100_000 // allocations of a group
	MaxPorts     = 256     // of a group
	MaxLogFiles  = 1000
	MaxLogFileMB = 10_240
	maxName      = 128 // bytes of a group's or a task's name: it becomes the name of a folder
	maxJobID     = 512
	maxDevices   = 1024 // devices of one request
	maxDeviceMiB = 1 << 24
)

var (
	namespaceName = regexp.MustCompile(`^[a-zA-Z0-9-]{1,128}$`)
	poolName      = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,128}$`)
	envName       = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_.]*$`)
	portLabel     = regexp.MustCompile(`^[a-zA-Z0-9_]{1,64}$`)
	fileMode      = regexp.MustCompile(`^0?[0-7]{3}$`)
)

func (c *checker) oneOf(value, path string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		c.fault(path, "unknown value %s%s%s", quote(value), didYouMean(value, allowed), known(allowed))
	}
}

func (c *checker) notNegative(d time.Duration, path string) {
	if d < 0 {
		c.fault(path, "is %v; it must not be negative", d)
	}
}

// hasControl says whether a name holds what no terminal, log or table can show: null, line breaks, colours.
func hasControl(s string) bool { return strings.ContainsFunc(s, unicode.IsControl) }

func (c *checker) jobNames(j *cluster.Job) {
	switch {
	case j.ID == "":
		c.fault("id", "is missing")
	case len(j.ID) > maxJobID:
		c.fault("id", "is %d bytes long; at most %d are allowed", len(j.ID), maxJobID)
	case strings.Contains(j.ID, " ") || hasControl(j.ID):
		c.fault("id", "%s must hold no space and no control character", quote(j.ID))
	}
	switch {
	case j.Name == "":
		c.fault("name", "is missing")
	case len(j.Name) > maxJobID:
		c.fault("name", "is %d bytes long; at most %d are allowed", len(j.Name), maxJobID)
	case hasControl(j.Name):
		c.fault("name", "%s must hold no control character", quote(j.Name))
	}
	if c.options.Region != "" && j.Region != c.options.Region {
		c.fault("region", "%s is not this region, which is %s", quote(j.Region), quote(c.options.Region))
	}
	if !namespaceName.MatchString(j.Namespace) {
		c.fault("namespace", "%s is no name of a namespace: 1 to 128 letters, digits and -", quote(j.Namespace))
	}
	if !poolName.MatchString(j.NodePool) {
		c.fault("node_pool", "%s is no name of a node pool: 1 to 128 letters, digits, - and _", quote(j.NodePool))
	}
	if types := []string{cluster.JobTypeService, cluster.JobTypeBatch, cluster.JobTypeSystem, cluster.JobTypeSysBatch}; !slices.Contains(types, j.Type) {
		c.fault("type", "unknown job type %s%s%s", quote(j.Type), didYouMean(j.Type, types), known(types))
	}
	if j.Priority < 1 || j.Priority > 100 {
		c.fault("priority", "is %d; it must be between 1 and 100", j.Priority)
	}
	for _, dc := range j.Datacenters {
		if strings.TrimSpace(dc) == "" {
			c.fault("datacenters", "holds an empty name")
		} else if _, err := path.Match(dc, ""); err != nil {
			c.fault("datacenters", "%s is no pattern of a name", quote(dc))
		}
	}
}

func (c *checker) groupName(name, path string, seen map[string]bool) {
	switch {
	case name == "":
		c.fault(path, "has no name")
	case seen[name]:
		c.fault(path, "is there twice; the names of a job's groups must differ")
	case len(name) > maxName || hasControl(name):
		c.fault(path, "a group's name has at most %d bytes and no control character", maxName)
	}
	seen[name] = true
}

func (c *checker) taskName(name, path string, seen map[string]bool) {
	switch {
	case name == "":
		c.fault(path, "has no name")
	case seen[name]:
		c.fault(path, "is there twice; the names of a group's tasks must differ")
	case name == "." || name == ".." || name == "alloc":
		c.fault(path, "%s cannot be a task's name: a folder of the allocation has it", quote(name))
	case len(name) > maxName || strings.ContainsAny(name, `/\`) || hasControl(name):
		c.fault(path, "a task's name has at most %d bytes and no slash or control character", maxName)
	}
	seen[name] = true
}

// targets are what the left side of a constraint may refer to; a trailing dot
// stands for any name below.
var targets = []string{
	"node.unique.id", "node.unique.name", "node.datacenter", "node.class", "node.pool", "attr.", "meta.",
}

var deviceTargets = []string{"device.model", "device.vendor", "device.type", "device.ids", "device.attr."}

// constraints checks the constraint blocks of a job, group, task or device.
func (c *checker) constraints(in []*api.Constraint, path string, at level) []*cluster.Constraint {
	var out []*cluster.Constraint
	list := present(in)
	properties := 0
	for i, con := range list {
		k := &cluster.Constraint{LTarget: con.LTarget, RTarget: con.RTarget, Operand: cmp.Or(con.Operand, "=")}
		block := element(join(path, "constraint"), i, len(list))
		c.constraint(k, block, at)
		if k.Operand == api.ConstraintDistinctProperty {
			if properties++; properties == MaxSpreads+1 {
				c.fault(join(block, "operator"), "there are more than %d constraints of %s; at most %d are allowed", MaxSpreads, k.Operand, MaxSpreads)
			}
		}
		out = append(out, k)
	}
	return out
}

// comparisons are the operators that look at a node, or a device, alone; operands
// are all that constraints have.
var (
	comparisons = []string{
		"=", "==", "is", "!=", "not", "<", "<=", ">", ">=", api.ConstraintRegex, api.ConstraintVersion, api.ConstraintSemver,
		api.ConstraintSetContains, api.ConstraintSetContainsAll, api.ConstraintSetContainsAny,
		api.ConstraintAttributeIsSet, api.ConstraintAttributeIsNotSet,
	}
	operands = append(slices.Clone(comparisons), api.ConstraintDistinctHosts, api.ConstraintDistinctProperty)
)

// distinct says whether an operator looks at where the job's other allocations are.
func distinct(operand string) bool {
	return operand == api.ConstraintDistinctHosts || operand == api.ConstraintDistinctProperty
}

// versionPart is one condition on a version: an operator and a number.
var (
	versionPart = regexp.MustCompile(`^(=|!=|>|<|>=|<=|~>)?\s*v?\d{1,18}(\.\d{1,18}){0,15}(-[0-9A-Za-z~-]+(\.[0-9A-Za-z~-]+)*)?(\+[0-9A-Za-z.~-]+)?$`)
	semverPart  = regexp.MustCompile(`^(=|!=|>|<|>=|<=)?\s*(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z.-]+)?$`)
)

func (c *checker) constraint(k *cluster.Constraint, path string, at level) {
	value := join(path, "value")
	if distinct(k.Operand) && (at == levelTask || at == levelDevice) {
		c.fault(join(path, "operator"), "%s belongs in the job or a group, not in a %s", k.Operand, at)
	}
	switch k.Operand {
	case api.ConstraintDistinctHosts:
		c.target(k.LTarget, join(path, "attribute"), at)
		on, err := strconv.ParseBool(cmp.Or(k.RTarget, "true"))
		if err != nil {
			c.fault(value, "%s is neither true nor false", quote(k.RTarget))
		}
		k.RTarget = strconv.FormatBool(on)
	case api.ConstraintDistinctProperty:
		c.property(k.LTarget, path, "whose values to count")
		n, err := strconv.Atoi(cmp.Or(k.RTarget, "1"))
		if err != nil || n < 1 || n > MaxCount {
			c.fault(value, "%s is no number of allocations between 1 and %d", quote(k.RTarget), MaxCount)
		}
		k.RTarget = strconv.Itoa(n)
	default:
		c.target(k.LTarget, join(path, "attribute"), at)
		c.comparison(k, path, operands)
	}
}

// comparison checks an operator of comparisons and what stands on its sides. allowed
// are those that a fault may recommend.
func (c *checker) comparison(k *cluster.Constraint, path string, allowed []string) {
	needsRight := true
	value := join(path, "value")
	switch k.Operand {
	case api.ConstraintRegex:
		if _, err := regexp.Compile(k.RTarget); err != nil {
			c.fault(value, "%s is no regular expression: %v", quote(k.RTarget), err)
		}
	case api.ConstraintVersion, api.ConstraintSemver:
		part := versionPart
		if k.Operand == api.ConstraintSemver {
			part = semverPart
		}
		for _, p := range strings.Split(k.RTarget, ",") {
			if p = strings.TrimSpace(p); k.RTarget != "" && !part.MatchString(p) {
				c.fault(value, `%s is no version condition; write for example ">= 1.2, < 2.0"`, quote(k.RTarget))
				break
			}
		}
	case api.ConstraintAttributeIsSet, api.ConstraintAttributeIsNotSet:
		needsRight = false
		if k.RTarget != "" {
			c.fault(value, "operator %s takes no value", k.Operand)
		}
	default:
		if !slices.Contains(comparisons, k.Operand) {
			c.fault(join(path, "operator"), "unknown operator %s%s%s", quote(k.Operand), didYouMean(k.Operand, allowed), known(allowed))
			return
		}
	}
	if k.LTarget == "" {
		c.fault(path, "has no attribute to compare")
	}
	if needsRight && k.RTarget == "" {
		c.fault(path, "operator %s needs a value", quote(k.Operand))
	}
}

func (c *checker) target(target, path string, at level) {
	name, ok := strings.CutPrefix(target, "${")
	if !ok {
		return // a literal
	}
	name, ok = strings.CutSuffix(name, "}")
	allowed := targets
	if at == levelDevice {
		allowed = append(slices.Clone(deviceTargets), targets...)
	}
	for _, t := range allowed {
		if ok && (name == t || strings.HasSuffix(t, ".") && strings.HasPrefix(name, t) && len(name) > len(t)) {
			return
		}
	}
	names := make([]string, len(allowed))
	for i, t := range allowed {
		if names[i] = t; strings.HasSuffix(t, ".") {
			names[i] += "NAME"
		}
	}
	c.fault(path, "unknown attribute %s%s", quote(target), known(names))
}

func (c *checker) env(in map[string]string, path string) map[string]string {
	for _, name := range sortedKeys(in) {
		if !envName.MatchString(name) {
			c.fault(join(path, name), "%s is no name of a variable: letters, digits, _ and ., first no digit", quote(name))
		} else if strings.Contains(in[name], "\x00") {
			c.fault(join(path, name), "must hold no null character")
		}
	}
	return cloneMap(in)
}

// cloneMap copies a map; an empty one becomes nil, so that equal jobs are equal.
func cloneMap(in map[string]string) map[string]string {
	if len(in) == 0 {
		return nil
	}
	return maps.Clone(in)
}

var signals = []string{
	"SIGABRT", "SIGALRM", "SIGCONT", "SIGHUP", "SIGINT", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGTERM", "SIGTRAP", "SIGTSTP",
	"SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2", "SIGWINCH",
}

func (c *checker) signal(name, path string) string {
	upper := strings.ToUpper(name)
	if upper != "" && !slices.Contains(signals, upper) {
		c.fault(path, "unknown signal %s%s%s", quote(name), didYouMean(upper, signals), known(signals))
	}
	return upper
}

func (c *checker) networks(in []*api.NetworkResource, path string) []*cluster.NetworkResource {
	list := present(in)
	if len(list) > 1 {
		c.fault(join(path, "network[1]"), "a group has one network block, not %d", len(list))
	}
	var out []*cluster.NetworkResource
	for i, n := range list {
		at := element(join(path, "network"), i, len(list))
		switch n.Mode {
		case "", "host":
		case "bridge", "none":
			c.fault(join(at, "mode"), "network mode %s %s; known: host", quote(n.Mode), notYet)
		default:
			if strings.HasPrefix(n.Mode, "cni/") {
				c.fault(join(at, "mode"), "network mode %s %s; known: host", quote(n.Mode), notYet)
			} else {
				c.fault(join(at, "mode"), "unknown network mode %s; known: host", quote(n.Mode))
			}
		}
		if len(n.ReservedPorts)+len(n.DynamicPorts) > MaxPorts {
			c.fault(at, "has more than %d ports", MaxPorts)
			continue
		}
		net := &cluster.NetworkResource{Mode: "host"}
		seen := map[string]bool{}
		static := map[int]string{}
		for _, p := range slices.Concat(n.ReservedPorts, n.DynamicPorts) {
			port := c.port(p, join(at, join("port", p.Label)), seen, static)
			if port.Value > 0 {
				net.ReservedPorts = append(net.ReservedPorts, port)
			} else {
				net.DynamicPorts = append(net.DynamicPorts, port)
			}
		}
		out = append(out, net)
	}
	return out
}

// defaultHostNetwork is what a port that names no host network belongs to.
const defaultHostNetwork = "default"

func (c *checker) port(in api.Port, path string, seen map[string]bool, static map[int]string) cluster.Port {
	p := cluster.Port{Label: in.Label, Value: in.Value, HostNetwork: in.HostNetwork}
	switch {
	case p.Label == "":
		c.fault(path, "has no label")
	case seen[p.Label]:
		c.fault(path, "is there twice; the labels of a group's ports must differ")
	case !portLabel.MatchString(p.Label):
		c.fault(path, "%s is no label of a port: 1 to 64 letters, digits and _", quote(p.Label))
	}
	seen[p.Label] = true
	if p.Value < 0 || p.Value > 65535 {
		c.fault(join(path, "static"), "is %d; a port is between 1 and 65535", p.Value)
	} else if other, taken := static[p.Value]; taken && p.Value > 0 {
		c.fault(join(path, "static"), "%d is the port of %s already", p.Value, quote(other))
	}
	static[p.Value] = p.Label
	if p.HostNetwork == "" {
		p.HostNetwork = defaultHostNetwork
	}
	if p.HostNetwork != defaultHostNetwork {
		c.fault(join(path, "host_network"), "host network %s %s; known: %s", quote(p.HostNetwork), notYet, defaultHostNetwork)
	}
	return p
}

// deviceForms are the requests for devices that this version fills.
var deviceForms = []string{"gpu", "nvidia/gpu", "nvidia/gpu/MODEL", "nvidia/gpu-milli", "nvidia/gpu-mib", "nvidia/mig-PROFILE"}

// migDevice matches the requests for slices that a GPU is cut into (Multi-Instance GPU).
var migDevice = regexp.MustCompile(`^nvidia/mig-[0-9]+g\.[0-9]+gb[0-9a-z.+]*(/[^/]+)?$`)

func (c *checker) device(in *api.RequestedDevice, path string) *cluster.RequestedDevice {
	d := &cluster.RequestedDevice{Name: in.Name, Count: or(in.Count, 1), Constraints: c.constraints(in.Constraints, path, levelDevice)}
	d.Affinities = c.affinities(in.Affinities, path, levelDevice)
	device, milli, mib := d.Share()
	model, hasModel := strings.CutPrefix(device, "nvidia/gpu/")
	switch {
	case device == "gpu", device == "nvidia/gpu", hasModel && strings.TrimSpace(model) != "" && !strings.Contains(model, "/"), migDevice.MatchString(d.Name):
	default:
		c.fault(path, "unknown device %s%s%s", quote(d.Name), didYouMean(d.Name, deviceForms), known(deviceForms))
	}
	count := join(path, "count")
	switch {
	case d.Count < 1, device == d.Name && d.Count > maxDevices:
		c.fault(count, "is %d; it must be between 1 and %d", d.Count, maxDevices)
	case milli >= cluster.WholeMilli:
		c.fault(count, "is %d thousandths of a GPU; it must be between 1 and %d, a whole one is device \"nvidia/gpu\"", milli, cluster.WholeMilli-1)
	case mib > maxDeviceMiB:
		c.fault(count, "is %d MiB; it must be between 1 and %d", d.Count, maxDeviceMiB)
	}
	return d
}

// shares checks that all requests for a share of a GPU in a task mean the same GPU.
func (c *checker) shares(devices []*cluster.RequestedDevice, path string) {
	var whole, milli, mib, model string
	for _, d := range devices {
		at := join(path, join("device", d.Name))
		device, thousandths, memory := d.Share()
		seen := &whole
		switch {
		case thousandths > 0:
			seen = &milli
		case memory > 0:
			seen = &mib
		}
		if *seen != "" && seen != &whole {
			c.fault(at, "is a second request for a share; a task has one device \"nvidia/gpu-milli\" and one \"nvidia/gpu-mib\" at most, which mean the same GPU")
		}
		*seen = d.Name
		if _, name, _ := strings.Cut(strings.TrimPrefix(device, "nvidia/"), "/"); name != "" && seen != &whole {
			if model != "" && model != name {
				c.fault(at, "names another model than the task's other request for a share, which means the same GPU")
			}
			model = name
		}
	}
	switch {
	case milli == "" && mib == "":
	case whole != "":
		c.fault(path, "device %s asks for whole GPUs and device %s for a share of one; a task can have either", quote(whole), quote(cmp.Or(milli, mib)))
	default:
		c.warn(path, "a share of a GPU is counted when work is placed; the GPU itself does not hold tasks to it, see CUDA_MPS_ACTIVE_THREAD_PERCENTAGE and RX_GPU_MIB")
	}
}

// archives are the endings that a download in mode any would be unpacked by.
var archives = regexp.MustCompile(`\.(tar|tgz|tbz2|txz|zip|gz|bz2|xz|zst)$`)

func (c *checker) artifact(in *api.TaskArtifact, at string) *cluster.Artifact {
	a := &cluster.Artifact{
		GetterSource:  or(in.GetterSource, ""),
		GetterOptions: cloneMap(in.GetterOptions),
		GetterHeaders: cloneMap(in.GetterHeaders),
		GetterMode:    or(in.GetterMode, "any"),
		RelativeDest:  or(in.RelativeDest, ""),
	}
	source := join(at, "source")
	scheme, _, forced := strings.Cut(a.GetterSource, "::")
	u, err := url.Parse(a.GetterSource)
	switch {
	case a.GetterSource == "":
		c.fault(source, "is missing")
	case forced:
		c.fault(source, "getter %s %s; write an http or https URL", quote(scheme), notYet)
	case strings.HasPrefix(a.GetterSource, "${"): // known on the node only
	case err != nil:
		c.fault(source, "%s is no URL: %v", quote(a.GetterSource), err)
	case !slices.Contains([]string{"http", "https", "file", ""}, u.Scheme):
		c.fault(source, "scheme %s %s; known: http, https, file", quote(u.Scheme), notYet)
	}
	archive := true
	for _, k := range sortedKeys(a.GetterOptions) {
		v, option := a.GetterOptions[k], join(at, "options."+k)
		switch k {
		case "checksum":
			sum, ok := strings.CutPrefix(v, "sha256:")
			if b, err := hex.DecodeString(sum); !strings.Contains(v, "${") && (!ok || err != nil || len(b) != 32) {
				c.fault(option, "%s is not sha256: and 64 hex digits", quote(v))
			}
		case "archive":
			archive = v != "false" && v != "0"
		default:
			c.fault(option, "option %s %s; known: archive, checksum", quote(k), notYet)
		}
	}
	switch a.GetterMode {
	case "any", "file":
	case "dir":
		c.fault(join(at, "mode"), `"dir" %s; known: any, file`, notYet)
	default:
		c.oneOf(a.GetterMode, join(at, "mode"), "any", "file")
	}
	if a.GetterMode == "any" && archive && err == nil && archives.MatchString(u.Path) {
		c.fault(source, `unpacking an archive %s; set mode = "file" or options { archive = false }`, notYet)
	}
	for k := range a.GetterHeaders {
		if k == "" || textproto.TrimString(k) != k || strings.ContainsAny(k, " :\r\n") || strings.ContainsAny(a.GetterHeaders[k], "\r\n") {
			c.fault(join(at, "headers"), "%s is no HTTP header", quote(k))
		}
	}
	if a.RelativeDest == "" {
		a.RelativeDest = "local/"
		if a.GetterMode == "file" && err == nil {
			a.RelativeDest = path.Join("local", path.Base(u.Path))
		}
	}
	c.inside(a.RelativeDest, join(at, "destination"))
	return a
}

// inside refuses a path that leaves the task's folder. One that starts with a
// reference is known on the node only, which looks again.
func (c *checker) inside(dest, at string) {
	if strings.HasPrefix(dest, "${") {
		return
	}
	if clean := path.Clean("/" + dest); dest != "" && strings.TrimPrefix(clean, "/") == path.Clean(strings.TrimPrefix(dest, "/")) {
		return
	}
	if dest != "" && path.Clean(dest) == "." {
		return
	}
	c.fault(at, "%s leads out of the task's folder", quote(dest))
}
