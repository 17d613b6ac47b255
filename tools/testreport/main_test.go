package main

import (
	"strings"
	"testing"
)

const stream = `{"Action":"start","Package":"github.com/rxvision/rxvision/a"}
{"Action":"run","Package":"github.com/rxvision/rxvision/a","Test":"TestGood"}
{"Action":"output","Package":"github.com/rxvision/rxvision/a","Test":"TestGood","Output":"    a_test.go:3: MEASURED rate="}
{"Action":"output","Package":"github.com/rxvision/rxvision/a","Test":"TestGood","Output":"12/s\n"}
{"Action":"output","Package":"github.com/rxvision/rxvision/a","Test":"TestGood","Output":"not for the reader\n"}
{"Action":"pass","Package":"github.com/rxvision/rxvision/a","Test":"TestGood","Elapsed":1.5}
{"Action":"run","Package":"github.com/rxvision/rxvision/a","Test":"TestGPU"}
{"Action":"run","Package":"github.com/rxvision/rxvision/a","Test":"TestGPU/one"}
{"Action":"output","Package":"github.com/rxvision/rxvision/a","Test":"TestGPU/one","Output":"    a_test.go:9: no GPU here\n"}
{"Action":"skip","Package":"github.com/rxvision/rxvision/a","Test":"TestGPU/one","Elapsed":0}
{"Action":"pass","Package":"github.com/rxvision/rxvision/a","Test":"TestGPU","Elapsed":0}
{"Action":"pass","Package":"github.com/rxvision/rxvision/a","Elapsed":2}
{"Action":"skip","Package":"github.com/rxvision/rxvision/none","Elapsed":0}
`

func TestReport(t *testing.T) {
	const crash = `{"Action":"run","Package":"b","Test":"TestCrash"}
{"Action":"output","Package":"b","Test":"TestCrash","Output":"panic: oh\n"}
{"Action":"output","Package":"b","Output":"FAIL b\n"}
{"Action":"fail","Package":"b","Elapsed":1}
`
	const build = `{"ImportPath":"c","Action":"build-output","Output":"c.go:1: syntax error\n"}
{"ImportPath":"c","Action":"build-fail"}
{"Action":"fail","Package":"c","Elapsed":0,"FailedBuild":"c"}
`
	for _, c := range []struct {
		name, in, skips string
		strict          bool
		code            int
		has             []string
	}{
		{"good", stream, "", false, 0, []string{
			"\nMEASURED rate=12/s\n", "ok    a ", "a TestGPU/one: a_test.go:9: no GPU here\n", "    1.5s  a TestGood\n", "\n2 passed, 0 failed, 1 skipped\n",
		}},
		{"unlisted skip", stream, "a TestOther # no\n", true, 1, []string{"not listed", "1 skips are not listed"}},
		{"listed skip", stream, "# peers\na TestGPU # needs a GPU\n", true, 0, []string{"2 passed, 0 failed, 1 skipped\n"}},
		{"crash", stream + crash, "", false, 1, []string{
			"=== b TestCrash did not finish\npanic: oh\n", "FAIL b\n", "2 passed, 1 failed, 1 skipped\n",
		}},
		{"build", build, "", false, 1, []string{"=== build of c failed\nc.go:1: syntax error\n", "0 passed, 1 failed, 0 skipped\n"}},
		{"empty", "", "", false, 1, []string{"no test ran\n"}},
		{"stray", stream + "go: cannot find main module\n", "", false, 1, []string{"\ngo: cannot find main module\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			allowed, err := readSkips(strings.NewReader(c.skips))
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			r := newReport(&out)
			if err := r.read(strings.NewReader(c.in)); err != nil {
				t.Fatal(err)
			}
			if code := r.summary(allowed, c.strict); code != c.code {
				t.Errorf("exit status %d, want %d", code, c.code)
			}
			text := "\n" + out.String()
			for _, want := range c.has {
				if !strings.Contains(text, want) {
					t.Errorf("no %q", want)
				}
			}
			if strings.Contains(text, "not for the reader") {
				t.Error("the output of a good test is printed")
			}
			if t.Failed() {
				t.Log(text)
			}
		})
	}
}

func TestOutputIsBounded(t *testing.T) {
	var out strings.Builder
	r := newReport(&out)
	long := strings.Repeat("x", maxOutput/2+1) + "\n"
	for range 4 {
		r.add(event{Action: "output", Package: "a", Test: "T", Output: long})
	}
	if got, limit := r.test("a", "T").out.Len(), maxOutput+len(cutNote); got != limit {
		t.Errorf("kept %d bytes, want %d", got, limit)
	}
}

func TestReadSkipsNamesEveryFault(t *testing.T) {
	_, err := readSkips(strings.NewReader("a TestX\n\n# fine\nb # why\nc TestZ # because\n"))
	if err == nil || !strings.Contains(err.Error(), "line 1") || !strings.Contains(err.Error(), "line 4") || strings.Contains(err.Error(), "line 5") {
		t.Errorf("got %v", err)
	}
}
