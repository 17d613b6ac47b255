package jobspec

import (
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// The drivers whose config this version knows.
const (
	DriverONNX    = "onnx"
	DriverRawExec = "raw_exec"
	DriverExec    = "exec"
)

// Drivers lists them; Options.Drivers is usually this.
func Drivers() []string { return []string{DriverONNX, DriverRawExec, DriverExec} }

// laterDrivers are drivers of Nomad's that rxvision has not.
var laterDrivers = []string{"docker", "podman", "java", "qemu", "exec2", "mock_driver"}

// kind is the type of a config value.
type kind int

const (
	aString kind = iota
	aCount       // a whole number from 0 to maxThreads
	aList        // of strings
	later        // a key of Nomad's that is not honoured
)

type configKey struct {
	kind     kind
	required bool
}

// configKeys is each driver's config block.
var configKeys = map[string]map[string]configKey{
	DriverONNX: {
		"model":   {aString, true},  // NAME, NAME@ALIAS or NAME:VERSION
		"port":    {aString, false}, // label of the port to serve on, default http
		"threads": {aCount, false},  // of one inference; 0 or absent: the worker decides
	},
	DriverRawExec: {
		"command": {aString, true}, "args": {aList, false}, "work_dir": {aString, false},
		"cgroup_v1_override": {later, false}, "cgroup_v2_override": {later, false},
		"oom_score_adj": {later, false}, "denied_envvars": {later, false},
	},
	DriverExec: {
		"command": {aString, true}, "args": {aList, false}, "work_dir": {aString, false},
		"pid_mode": {later, false}, "ipc_mode": {later, false}, "cap_add": {later, false}, "cap_drop": {later, false},
	},
}

const maxThreads = 1024

// defaultServingPort is the label of the port that an onnx task serves on.
const defaultServingPort = "http"

// driver checks a task's driver and config and stores the config as canonical JSON.
func (c *checker) driver(t *cluster.Task, config map[string]any, path string) {
	at := join(path, "driver")
	switch {
	case t.Driver == "":
		c.fault(at, "is missing%s", known(c.options.Drivers))
	case slices.Contains(c.options.Drivers, t.Driver):
		c.config(t, config, join(path, "config"))
	case slices.Contains(laterDrivers, t.Driver):
		c.fault(at, "driver %s %s%s", quote(t.Driver), notYet, known(c.options.Drivers))
	default:
		c.fault(at, "unknown driver %s%s%s", quote(t.Driver), didYouMean(t.Driver, c.options.Drivers), known(c.options.Drivers))
	}
}

func (c *checker) config(t *cluster.Task, config map[string]any, path string) {
	keys, checked := configKeys[t.Driver]
	clean := map[string]any{}
	for _, name := range sortedKeys(config) {
		key, ok := keys[name]
		switch {
		case !checked:
			clean[name] = config[name]
		case config[name] == nil: // `key = null` leaves it out
		case !ok:
			c.fault(join(path, name), "driver %s has no key %s%s%s", t.Driver, quote(name), didYouMean(name, knownKeys(keys)), known(knownKeys(keys)))
		case key.kind == later:
			c.fault(join(path, name), notYet)
		default:
			v, err := key.kind.convert(config[name])
			if err != nil {
				c.fault(join(path, name), "%v", err)
				continue
			}
			clean[name] = v
		}
	}
	for _, name := range sortedKeys(keys) {
		if keys[name].required && (config[name] == nil || config[name] == "") {
			c.fault(path, "driver %s needs the key %s", t.Driver, quote(name))
		}
	}
	raw, err := json.Marshal(clean)
	if err != nil {
		c.fault(path, "cannot be written as JSON: %v", err)
		return
	}
	t.Config = raw
	if model, _ := clean["model"].(string); t.Driver == DriverONNX && model != "" {
		t.Model, err = ParseModelRef(model)
		if err != nil {
			c.fault(join(path, "model"), "%v", err)
		}
	}
}

// knownKeys are the keys that a config block may hold.
func knownKeys(keys map[string]configKey) []string {
	return slices.DeleteFunc(sortedKeys(keys), func(k string) bool { return keys[k].kind == later })
}

// convert brings a value to its kind as HCL would: numbers and booleans where
// strings are wanted become strings, and strings of digits numbers.
func (k kind) convert(v any) (any, error) {
	switch k {
	case aString:
		if s, ok := scalar(v); ok {
			return s, nil
		}
		return nil, fmt.Errorf("must be a string, not %s", describe(v))
	case aCount:
		s, ok := scalar(v)
		n, err := strconv.ParseUint(s, 10, 31)
		if !ok || err != nil || n > maxThreads {
			return nil, fmt.Errorf("must be a whole number from 0 to %d, not %s", maxThreads, describe(v))
		}
		return n, nil
	case aList:
		list, ok := v.([]any)
		if !ok {
			return nil, fmt.Errorf("must be a list of strings, not %s", describe(v))
		}
		out := make([]string, len(list))
		for i, item := range list {
			if out[i], ok = scalar(item); !ok {
				return nil, fmt.Errorf("item %d must be a string, not %s", i, describe(item))
			}
		}
		return out, nil
	}
	panic("unreachable: later keys are refused before")
}

func scalar(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, !strings.Contains(v, "\x00")
	case bool:
		return strconv.FormatBool(v), true
	case int:
		return strconv.Itoa(v), true
	case int64:
		return strconv.FormatInt(v, 10), true
	case float64:
		if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
			return strconv.FormatInt(int64(v), 10), true
		}
		return strconv.FormatFloat(v, 'g', -1, 64), true
	}
	return "", false
}

func describe(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case []any, []string, []map[string]any:
		return "a list"
	case map[string]any:
		return "a map"
	}
	return quote(fmt.Sprint(v))
}

// A model's name, as the registry has it, and an alias.
var (
	modelName  = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)
	modelAlias = modelName
)

// ParseModelRef reads NAME (the newest version), NAME@ALIAS or NAME:VERSION.
func ParseModelRef(ref string) (*cluster.ModelRef, error) {
	m := &cluster.ModelRef{Reference: ref, Name: ref}
	if name, alias, ok := strings.Cut(ref, "@"); ok {
		m.Name, m.Alias = name, alias
		if !modelAlias.MatchString(alias) {
			return nil, fmt.Errorf("model %s: %s is no alias: 1 to 128 letters, digits, _ . and -", quote(ref), quote(alias))
		}
	} else if name, version, ok := strings.Cut(ref, ":"); ok {
		n, err := strconv.ParseUint(version, 10, 64)
		if err != nil || n == 0 || version[0] == '+' {
			return nil, fmt.Errorf("model %s: %s is no version: 1, 2, 3…", quote(ref), quote(version))
		}
		m.Name, m.Version = name, n
	}
	if !modelName.MatchString(m.Name) {
		return nil, fmt.Errorf("%s names no model: write NAME, NAME@ALIAS or NAME:VERSION, a name being 1 to 128 letters, digits, _ . and -, first a letter or digit", quote(ref))
	}
	return m, nil
}

// ServingPort is the label of the port that an onnx task's worker listens on.
func ServingPort(t *cluster.Task) string {
	var config struct{ Port string }
	if json.Unmarshal(t.Config, &config) != nil || config.Port == "" {
		return defaultServingPort
	}
	return config.Port
}

// servingPorts sees to it that each onnx task of a group has a port of its own. A
// group without the default port gets it as a dynamic one.
func (c *checker) servingPorts(g *cluster.TaskGroup, path string) {
	user := map[string]string{}
	for _, t := range g.Tasks {
		if t.Driver != DriverONNX || t.Config == nil {
			continue
		}
		label, at := ServingPort(t), join(path, "task."+t.Name+".config.port")
		if other, taken := user[label]; taken {
			c.fault(at, "tasks %s and %s would both listen on port %s; give one of them another", quote(other), quote(t.Name), quote(label))
		}
		user[label] = t.Name
		labels := portLabels(g)
		if slices.Contains(labels, label) {
			continue
		}
		if label != defaultServingPort {
			c.fault(at, "the group's network has no port %s%s", quote(label), didYouMean(label, labels))
			continue
		}
		if len(g.Networks) == 0 {
			g.Networks = []*cluster.NetworkResource{{Mode: "host"}}
		}
		n := g.Networks[0]
		n.DynamicPorts = append(n.DynamicPorts, cluster.Port{Label: label, HostNetwork: defaultHostNetwork})
	}
}

func portLabels(g *cluster.TaskGroup) []string {
	var labels []string
	for _, n := range g.Networks {
		for _, p := range slices.Concat(n.ReservedPorts, n.DynamicPorts) {
			labels = append(labels, p.Label)
		}
	}
	return labels
}
