package task

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/rxvision/rxvision/cluster"
)

// maxTemplate bounds a template's source and its result.
const maxTemplate = 1 << 20

const templateFuncs = "env, mustEnv, envOrDefault, toLower, toUpper and trimSpace"

// RenderTemplates writes a task's template blocks into its directory. Those with
// `env = true` add their NAME=value lines to e instead of only being a file.
func RenderTemplates(templates []*cluster.Template, dir Dir, e *Env) error {
	if len(templates) == 0 {
		return nil
	}
	root, err := os.OpenRoot(dir.Root())
	if err != nil {
		return err
	}
	defer root.Close()
	for i, t := range templates {
		if err := renderTemplate(root, t, dir, e); err != nil {
			name := t.DestPath
			if name == "" {
				name = strconv.Itoa(i)
			}
			return fmt.Errorf("template %s: %w", name, err)
		}
	}
	return nil
}

func renderTemplate(root *os.Root, t *cluster.Template, dir Dir, e *Env) error {
	source := t.EmbeddedTmpl
	if t.SourcePath != "" {
		path, err := dir.rel(e.Expand(t.SourcePath))
		if err != nil {
			return err
		}
		if source, err = readBounded(root, path); err != nil {
			return err
		}
	}
	text, err := render(source, t.LeftDelim, t.RightDelim, e)
	if err != nil {
		return err
	}
	perm := os.FileMode(0o644)
	if t.Perms != "" {
		p, err := strconv.ParseUint(t.Perms, 8, 12)
		if err != nil || p > 0o777 {
			return fmt.Errorf("perms %q is not an octal file mode such as 0644", t.Perms)
		}
		perm = os.FileMode(p)
	}
	if t.DestPath == "" {
		return errors.New("no destination given")
	}
	dest, err := dir.rel(e.Expand(t.DestPath))
	if err != nil {
		return err
	}
	if err := root.MkdirAll(filepath.Dir(dest), 0o777); err != nil {
		return err
	}
	if err := root.Remove(dest); err != nil && !errors.Is(err, os.ErrNotExist) { // of an earlier start, maybe read-only
		return err
	}
	if err := root.WriteFile(dest, text, perm); err != nil {
		return err
	}
	if err := root.Chmod(dest, perm); err != nil { // the umask is not the job's
		return err
	}
	if !t.Envvars {
		return nil
	}
	vars, err := parseVariables(text)
	if err != nil {
		return err
	}
	e.add(vars)
	return nil
}

func readBounded(root *os.Root, path string) (string, error) {
	f, err := root.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTemplate+1))
	if err == nil && len(b) > maxTemplate {
		err = fmt.Errorf("source %s is over %d bytes", path, maxTemplate)
	}
	return string(b), err
}

// render executes a template with the variables of e. Only what cannot loop is
// allowed: a job's text must not hold the agent up.
func render(source, left, right string, e *Env) ([]byte, error) {
	if len(source) > maxTemplate {
		return nil, fmt.Errorf("source is over %d bytes", maxTemplate)
	}
	t, err := template.New("").Delims(left, right).Option("missingkey=error").Funcs(template.FuncMap{
		"env": func(name string) string { v, _ := e.Get(name); return v },
		"mustEnv": func(name string) (string, error) {
			v, ok := e.Get(name)
			if !ok {
				return "", fmt.Errorf("variable %q is not set", name)
			}
			return v, nil
		},
		"envOrDefault": func(name, fallback string) string {
			if v, ok := e.Get(name); ok && v != "" {
				return v
			}
			return fallback
		},
		"toLower": strings.ToLower, "toUpper": strings.ToUpper, "trimSpace": strings.TrimSpace,
	}).Parse(source)
	if err != nil {
		return nil, fmt.Errorf("%s (supported functions are %s)", templateError(err), templateFuncs)
	}
	if len(t.Templates()) > 1 {
		return nil, errors.New("define and block are not supported")
	}
	if t.Tree == nil {
		return nil, nil
	}
	if err := checkNodes(t.Root); err != nil {
		return nil, err
	}
	var out limitedBuffer
	if err := t.Execute(&out, nil); err != nil {
		return nil, errors.New(templateError(err))
	}
	return out.Bytes(), nil
}

// templateError drops the package's own prefix.
func templateError(err error) string { return strings.TrimPrefix(err.Error(), "template: :") }

func checkNodes(n parse.Node) error {
	switch n := n.(type) {
	case *parse.ListNode:
		if n == nil {
			return nil
		}
		for _, child := range n.Nodes {
			if err := checkNodes(child); err != nil {
				return err
			}
		}
	case *parse.IfNode:
		return errors.Join(checkNodes(n.List), checkNodes(n.ElseList))
	case *parse.WithNode:
		return errors.Join(checkNodes(n.List), checkNodes(n.ElseList))
	case *parse.RangeNode, *parse.TemplateNode:
		return fmt.Errorf("%q is not supported: only if, with and the functions %s", n, templateFuncs)
	}
	return nil
}

type limitedBuffer struct{ bytes.Buffer }

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxTemplate {
		return 0, fmt.Errorf("result is over %d bytes", maxTemplate)
	}
	return b.Buffer.Write(p)
}

// parseVariables reads NAME=value lines; blank lines and # comments are skipped,
// and a value may be quoted.
func parseVariables(text []byte) (map[string]string, error) {
	vars := map[string]string{}
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimPrefix(line, "export "), "=")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return nil, fmt.Errorf("line %d is not NAME=value", i+1)
		}
		value = strings.TrimSpace(value)
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		vars[name] = value
	}
	return vars, nil
}
